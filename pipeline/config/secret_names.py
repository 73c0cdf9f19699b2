"""Tells from the name of a variable whether it holds a secret."""

import re

_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
"""Matches between the words of a name such as awsSecretKey."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SECRET = _words(
    "SECRET SECRETS PASSWORD PASSWORDS PASSWD PASSPHRASE PWD CREDENTIAL CREDENTIALS TOKEN APIKEY ACCESSKEY SECRETKEY "
    "PRIVATEKEY AUTHTOKEN BEARER JWT"
)
_ENDS = ("PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "ACCESSKEY", "SECRETKEY", "APIKEY", "PRIVATEKEY")
"""The ends of words that are several in one, such as PGPASSWORD."""
_BEFORE_KEY = _words("ACCESS API PRIVATE ACCOUNT STORAGE SIGNING ENCRYPTION MASTER SSH AUTH SERVICE HMAC")
"""The words before KEY that make it a secret. Other keys are those of rows, such as PRIMARY_KEY."""
_BEFORE_PASS = _words("DB USER ROOT ADMIN PROXY FTP SFTP")
"""The words before PASS that make it a password."""
_OF_TEXT = _words(
    "BOS EOS PAD MASK UNK SEP CLS STOP END START BEGIN SPECIAL CONTROL FIRST LAST MAX MIN NUM PER MULTI NEXT PROMPT NEW"
)
"""The words before TOKEN that make it one of a tokenizer."""
_ABOUT = _words(
    "FILE PATH DIR FOLDER NAME ARN COLUMN COUNT COUNTS LIMIT BUDGET LENGTH LEN SIZE IDS RATE TYPE MODE EXPIRY URI "
    "PREFIX SUFFIX BUCKET DATASET"
)
"""The last words of names that mean something about a secret or a token, and not its value."""


def names_secret(name: str) -> bool:
    """Return whether a variable of this name probably holds a secret, such as AWS_SECRET_ACCESS_KEY or HF_TOKEN.

    Names such as MAX_TOKENS, TOKENIZER, EOS_TOKEN, KEY_COLUMN, SECRET_NAME and PWD, the current folder, do not.
    """
    # A number, as in TOKEN2 or TOKEN_2, only tells several of a kind apart.
    parts = (part.rstrip("0123456789").upper() for part in _CAPITAL.sub("_", name).split("_"))
    words = [part for part in parts if part]
    if not words or words[-1] in _ABOUT or words == ["PWD"]:
        return False
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        if word == "TOKEN" and (before in _OF_TEXT or words[number + 1 : number + 2] == ["ID"]):
            continue
        if word in _SECRET or word.endswith(_ENDS) or (word == "KEY" and before in _BEFORE_KEY):
            return True
        if word == "PASS" and before in _BEFORE_PASS:
            return True
    return words[-2:] == ["CONNECTION", "STRING"]
