"""Tests where a row ends, with a decoder that maps id 65 to "A" and so on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import GenerationParams
from model.engine.stopping import End, find_end


def decode(ids: object) -> str:
    return bytes(ids).decode(errors="replace")  # type: ignore[call-overload, no-any-return]


def ids(text: str) -> list[int]:
    return list(text.encode())


def params(limit: int = 100, stop: tuple[str, ...] = (), eos: str = "") -> GenerationParams:
    return GenerationParams(max_new_tokens=limit, stop=stop, eos_ids=tuple(ids(eos)))


@pytest.mark.parametrize(
    ("text", "settings", "end"),
    [
        ("abc", params(), None),
        ("abc", params(limit=4), None),
        ("abcd", params(limit=4), End("length", ids("abcd"), "abcd")),
        ("abcdef", params(limit=4), End("length", ids("abcd"), "abcd")),
        ("ab.cd.", params(eos="."), End("stop", ids("ab."), "ab")),
        ("ab.", params(limit=3, eos="."), End("stop", ids("ab."), "ab")),
        ("abc.", params(limit=3, eos="."), End("length", ids("abc"), "abc")),
        ("one\n\ntwo", params(stop=("\n\n",)), End("stop", ids("one\n\n"), "one")),
        ("one\n\ntwo", params(stop=("wo", "\n\n")), End("stop", ids("one\n\n"), "one")),
        ("a.b\n\n", params(stop=("\n\n",), eos="."), End("stop", ids("a."), "a")),
        ("a\n\nb.", params(stop=("\n\n",), eos="."), End("stop", ids("a\n\n"), "a")),
        ("xé", params(stop=("é",)), End("stop", ids("xé"), "x")),  # two tokens, one letter
        ("abcab", params(limit=5, stop=("zz",)), End("length", ids("abcab"), "abcab")),
        ("STOPmore", params(limit=2, stop=("STOP",)), End("length", ids("ST"), "ST")),
        ("STOP", params(stop=("STOP",)), End("stop", ids("STOP"), "")),
    ],
)
def test_ends(text: str, settings: GenerationParams, end: End | None) -> None:
    """A row ends at an EOS, a stop string or its limit, whichever comes first. The tokens include the EOS or the stop
    string, the text does not."""
    assert find_end(ids(text), settings, decode) == end


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert find_end([1, 2, 9], params(eos="\t"), None) == End("stop", [1, 2, 9], None)


@given(st.text(alphabet="ab.é", max_size=30), st.lists(st.integers(1, 5), max_size=20))
def test_the_end_does_not_depend_on_how_the_tokens_arrived(text: str, pieces: list[int]) -> None:
    """The end is the same whether tokens come one by one or in blocks, although old tokens are not looked at again."""
    settings = params(limit=18, stop=("ab", "éb"), eos=".")
    tokens, seen, end = ids(text), 0, None
    for piece in [*pieces, len(tokens)]:
        checked, seen = seen, min(seen + piece, len(tokens))
        end = find_end(tokens[:seen], settings, decode, checked)
        if end is not None:
            break
    assert end == find_end(tokens, settings, decode)


def test_old_text_is_not_decoded_again_for_stop_strings() -> None:
    """Checking one more token costs the same after 100 and after 10,000 tokens. Tokens without text do not hide a stop
    string."""
    settings = params(limit=20_000, stop=("ab", "xyz"))
    decoded = 0

    def counting(tokens: object) -> str:
        nonlocal decoded
        decoded += len(tokens)  # type: ignore[arg-type]
        return decode(bytes(tokens).replace(b"\0", b""))  # type: ignore[call-overload]

    costs = []
    for length in (100, 10_000):
        decoded = 0
        assert find_end([*ids("-" * length), *ids("q")], settings, counting, checked=length) is None
        costs.append(decoded)
    assert costs[0] == costs[1]
    hidden = ids("--x" + "\0" * 500 + "y" + "\0" * 90 + "z")
    assert find_end(hidden, settings, counting, checked=len(hidden) - 1) == End("stop", hidden, "--")
