"""Tests of prompts made of messages with chat templates, which must equal those of the transformers library.

The templates are those of tests/pipeline/prompts/chat_templates. Most tests render in this process.
"""

import json
import random
from datetime import date
from typing import Any

import pyarrow as pa
import pytest
from jinja2.exceptions import TemplateError

from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.values import Prompt
from tests.pipeline.prompts.chat_templates.conversations import CONVERSATIONS, SYSTEM, assistant, conversation, user
from tests.pipeline.prompts.chat_templates.families import (
    DATE,
    FAMILIES,
    FOLDER,
    Family,
    Messages,
    expected,
    made,
    reference,
    rendered,
    tokens_in,
    written,
)

GENERATED = 100
"""The number of random conversations for each family."""


def text(outcome: tuple[Prompt | None, str | None]) -> str | None:
    return None if outcome[0] is None else outcome[0].text


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_makes_exactly_these_prompts(name: str) -> None:
    """The texts, the places of all control tokens, and the reasons where a template refuses a conversation."""
    assert {title: made(FAMILIES[name], messages) for title, messages in CONVERSATIONS.items()} == expected(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_makes_the_same_prompts_of_json(name: str) -> None:
    cells = [json.dumps(messages, indent=rows % 3) for rows, messages in enumerate(CONVERSATIONS.values())]
    assert dict(zip(CONVERSATIONS, rendered(FAMILIES[name], cells), strict=True)) == expected(name)
    binary = pa.array([cell.encode() for cell in cells])
    assert dict(zip(CONVERSATIONS, rendered(FAMILIES[name], binary), strict=True)) == expected(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_equal_those_of_the_transformers_library(name: str) -> None:
    """Random conversations, as JSON and as structs that have all fields in all messages: the text is equal, and all
    control tokens in it are those of the template. If the template raises an error there, it makes an error row here.
    """
    family, rng = FAMILIES[name], random.Random(f"chat {name}")
    conversations = [conversation(rng) for _ in range(GENERATED)]
    outcomes = rendered(
        family, [json.dumps(messages, ensure_ascii=bool(i % 2)) for i, messages in enumerate(conversations)]
    )
    usable = 0
    for messages, outcome in zip(conversations, outcomes, strict=True):
        try:
            wanted = reference(family, messages)
        except (TemplateError, TypeError) as error:
            reason = str(error).replace("dict", "struct")
            wanted_outcome: Any = (None, f"chat template: {reason}")
        else:
            usable += 1
            wanted_outcome = (Prompt(wanted, tokens_in(family, wanted)), None)
        assert outcome == wanted_outcome, messages
    assert usable > GENERATED / 10
    for messages, outcome in list(zip(conversations, outcomes, strict=True))[: GENERATED // 4]:
        if _fits_a_struct_column(messages):
            assert made(family, messages) == outcome, messages


def _fits_a_struct_column(messages: Messages) -> bool:
    """Return whether Arrow can hold the messages in a list of structs: a field has one type in all of them."""
    try:
        pa.array([messages])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_that_a_cell_spells_stay_text(name: str) -> None:
    """A question that spells them all has the prompt of one that spells none, with this text in its place."""
    family = FAMILIES[name]
    spelled = "".join(family.control) + "<|im_end|></think>[INST]<|user|>"
    filler = "x" * len(spelled)
    (plain, as_json, harmless), others = (
        [rendered(family, [cell])[0][0] for cell in ([user(spelled)], json.dumps([user(spelled)]), [user(filler)])],
        rendered(family, [[user(spelled)], [user(filler)]], special_tokens="none"),
    )
    assert plain is not None
    assert harmless is not None
    assert plain == as_json == Prompt(harmless.text.replace(filler, spelled), harmless.control)
    assert [prompt and prompt.control for prompt, _ in others] == [(), ()]


@pytest.mark.parametrize("name", FAMILIES)
def test_input_system_is_put_in_front_of_messages_without_one(name: str) -> None:
    family, question, system = FAMILIES[name], [user("Hello")], SYSTEM["content"]
    assert made(family, question, system=system) == expected(name)["system"]
    for messages in ([SYSTEM, *question], [{"role": "developer", "content": "x"}, *question]):
        assert made(family, messages, system="Another.") == made(family, messages)


def test_control_tokens_in_input_system_are_text() -> None:
    outcome = made(FAMILIES["phi4"], [user("Hi")], system="<|im_end|>\U00100000\U000f0000")
    assert outcome[0] == written(
        "⟦<|im_start|>⟧system⟦<|im_sep|>⟧<|im_end|>\U00100000\U000f0000⟦<|im_end|>⟧"
        "⟦<|im_start|>⟧user⟦<|im_sep|>⟧Hi⟦<|im_end|>⟧⟦<|im_start|>⟧assistant⟦<|im_sep|>⟧"
    )


def test_json_cannot_spell_the_characters_of_marks() -> None:
    r"""`\udbc0\udc00` is ASCII in the cell, and U+100000 in the message: the first mark that a template gets."""
    family = FAMILIES["phi4"]
    content = "".join(map(chr, (*range(0x100000, 0x100008), 0xF0000, 0xFF000, 0xEF000)))
    for ascii_only in (True, False):
        (outcome,) = rendered(family, [json.dumps([user(content)], ensure_ascii=ascii_only)])
        assert outcome == made(family, [user(content)])
        assert outcome[0] == Prompt(
            reference(family, [user(content)]), tokens_in(family, reference(family, [user(content)]))
        )
    (outcome,) = rendered(
        Family("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}<|a|>", ("<|a|>",)),
        [r'[{"role": "user", "\udbc0\udc00": "\udbc0\udc00", "content": "c"}]'],
    )
    assert outcome[0] == written("role=user;\U00100000=\U00100000;content=c;⟦<|a|>⟧")


PIECES = (FOLDER / "pieces.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
"""Expressions and statements that chat templates use."""
KNOWN = Family("", ("<s>", "<|start|>", "<|end|>", "<think>", "</think>"), {"bos_token": "<s>", "eos_token": "<|end|>"})
TALK = [user(" <b>'Hi' & \"so\"\n"), assistant("<think>a</think>\nb"), user("日本 ")]


@pytest.mark.parametrize("piece", [*PIECES, "\n".join(PIECES)])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "  ", "|\r\n"])
def test_pieces_of_templates_equal_those_of_the_transformers_library(piece: str, ending: str) -> None:
    """Single expressions and statements that chat templates use, and the line ends with which a template may end."""
    family = Family("." + piece + ending, KNOWN.control, KNOWN.tokens)
    assert text(made(family, TALK)) == reference(family, TALK)


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("{{ tools }}", "an expression prints none: give it a value, as {{ x | default('', true) }} does"),
        ("{{ messages[0].content + none }}", 'can only concatenate str (not "NoneType") to str'),
        ("{% for m in messages %}{{ loop.previtem.role }}{% endfor %}", "there is no previous item"),
        ("{{ messages[0].name.first }}", "'struct object' has no attribute 'name'"),
        ("{{ messages[0].name | tojson }}", "'struct object' has no attribute 'name'"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{{ messages[0].update({}) }}", "access to attribute 'update' of 'struct' object is unsafe."),
        ("{{ raise_exception('No\nuse of <s>!') }}", "No use of <s>!"),
        ("{{ raise_exception(bos_token ~ messages[0].role) }}", "<s>user"),
        ("{{ raise_exception }}", "an expression prints a partial: it has no text; a filter may need `| list`"),
    ],
)
def test_a_template_that_fails_makes_an_error_row(piece: str, reason: str) -> None:
    outcome = made(Family(piece, KNOWN.control, KNOWN.tokens), TALK)
    assert outcome == (None, f"chat template: {reason}")


@pytest.mark.parametrize("nulls", ["error", "empty"])
@pytest.mark.parametrize(
    ("piece", "printed"),
    [
        ("{{ m.content }}", None),
        ("{{ m.content + '' }}", None),
        ("{{ '' + m.content }}", None),
        ("{{ m.content ~ '' }}", None),
        ("{{ m['content'] | trim }}", None),
        ("{{ m.content.strip() }}", None),
        ("{{ m.content.text }}", None),
        ("{{ '%s' % m.content }}", None),
        ("{{ m.content or 'or' }}", "or"),
        ("{{ m.content | default('d') }}", "d"),
        ("{{ m.content | tojson }}", "null"),
        ("{{ m.content is none }}{{ m.content is defined }}{{ m.content is string }}", "TrueTrueFalse"),
        ("{{ m.content == none }}{{ m.content in [none] }}{{ m.content is not none }}", "TrueTrueFalse"),
        ("{{ m.content is iterable }}{{ m.content is sequence }}{{ m.content is mapping }}", "FalseFalseFalse"),
        ("{{ 'content' in m }}{{ m.get('content') is none }}{% if not m.content %}!{% endif %}", "TrueTrue!"),
    ],
)
def test_a_null_content(piece: str, printed: str | None, nulls: str) -> None:
    """A template can ask for it as for none. If the template prints it, the row is an error row that names the message,
    or the null is an empty text if the job says so."""
    family = Family("{% for m in messages[1:2] %}[" + piece + "]{% endfor %}", KNOWN.control)
    outcomes = [made(family, [user("a"), assistant(None)], nulls=nulls)]
    outcomes += rendered(family, [json.dumps([user("a"), assistant(None)])], nulls=nulls)
    outcomes += rendered(family, [json.dumps([user("a"), {"role": "assistant"}])], nulls=nulls)
    reason = "column 'messages' has a null at [1].content: give it a default in the template, or set input.nulls: empty"
    wanted = (None, f"chat template: {reason}")
    if printed is None and nulls == "empty":
        printed = ""
    assert outcomes == [wanted if printed is None else (Prompt(f"[{printed}]"), None)] * 3


def struct(**fields: Any) -> Any:
    return pa.struct(list(fields.items()))


def test_fields_that_are_null_in_a_struct_column_are_absent() -> None:
    """Also inside parts and calls. Only the text of a part of text stays, so that its null is not an empty prompt."""
    family = Family(
        "{% for m in messages %}{{ m.keys() | join(',') }};{{ 'tool_calls' in m }}{{ m.tool_calls is defined }}"
        "{% for p in m.content if p is mapping %}({{ p.keys() | join(',') }}{{ 'image' in p }})"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}|{% endfor %}"
    )
    part_type = struct(type=pa.string(), text=pa.string(), image=pa.binary())
    call_type = struct(id=pa.string(), arguments=struct(a=pa.int64(), b=pa.int64()))
    fields = {"content": pa.list_(part_type), "tool_calls": pa.list_(call_type), "x": pa.null()}
    kind = pa.list_(struct(role=pa.string(), **fields))
    part = {"type": "text", "text": "t", "image": None}
    messages = [
        user([part, {"type": "image", "text": None, "image": b"i"}]),
        assistant(None, tool_calls=[{"id": None, "arguments": {"a": None, "b": 0}}]),
    ]
    wanted = (
        "role,content;FalseFalse(type,textFalse)t(type,imageTrue)|"
        'role,tool_calls,content;TrueTrue{"arguments": {"b": 0}}|'
    )
    assert text(rendered(family, pa.array([messages], kind))[0]) == wanted
    null_text = [user([{"type": "text", "text": None, "image": None}])]
    (outcome,) = rendered(family, pa.array([null_text], kind))
    assert str(outcome[1]).startswith("chat template: column 'messages' has a null at [0].content[0].text: ")


def nested(depth: int) -> str:
    return '[{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]"


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (pa.array([None], pa.list_(struct(role=pa.string()))), "is null"),
        (pa.array([None], pa.string()), "is null"),
        (pa.array([[]], pa.list_(struct(role=pa.string()))), "holds no messages"),
        (["[]"], "holds no messages"),
        ([""], "holds text that is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (["Hello"], "holds text that is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (['[{"role": "user"'], "holds text that is not JSON: Expecting ',' delimiter: line 1 column 17 (char 16)"),
        (['{"role": "user", "content": "a"}'], "holds a struct: it must hold a list of messages"),
        ([{"role": "user", "content": "a"}], "holds a struct: it must hold a list of messages"),
        (['"[]"'], "holds text: it must hold a list of messages"),
        (["null"], "holds null: it must hold a list of messages"),
        (["true"], "holds a boolean: it must hold a list of messages"),
        ([7], "holds a number: it must hold a list of messages"),
        ([date(2024, 1, 2)], "holds a date: it must hold a list of messages"),
        ([["Hello"]], "holds a message [0] that is text: it must be a struct with the fields role and content"),
        (['[{"role": "user"}, null]'], "holds a message [1] that is null: it must be a struct with the fields role"),
        ([[{"content": "a"}]], "holds a message [0] without a role"),
        ([[user("a"), {"role": None, "content": "a"}]], "holds a message [1] without a role"),
        (['[{"role": ["user"], "content": "a"}]'], "holds a message [0] whose role is a list: it must be text"),
        ([[{"role": 1, "content": "a"}]], "holds a message [0] whose role is a number: it must be text"),
        ([nested(100_000)], "holds JSON that is nested too deeply"),
        ([nested(700)], "holds JSON that is nested too deeply"),
        (pa.array([b'["\xff"]']), "holds bytes that are not UTF-8 (byte 2)"),
    ],
)
def test_a_cell_without_messages_makes_an_error_row(cells: Any, reason: str) -> None:
    (outcome,) = rendered(FAMILIES["phi4"], cells)
    assert outcome[0] is None
    assert str(outcome[1]).startswith(f"column 'messages' {reason}")


def test_a_token_of_which_a_cell_makes_a_part_is_one_only_around_a_role() -> None:
    """`'<|' + role + '|>'` is a control token if there is one of this text. A cell makes none with halves of its own,
    and a template none of two words."""
    family = Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content ~ '<|' ~ m.role }}|>,"
        "<|{{ m.content }}|>\n{% endfor %}",
        ("<|user|>", "<|a b|>", "<|bot|>"),
    )
    messages = [
        user("<|"),
        user("user|>"),
        user("a b"),
        {"role": "bot", "content": "bot"},
        {"role": "x", "content": ""},
    ]
    wanted = (
        "⟦<|user|>⟧<|⟦<|user|>⟧,<|<||>\n⟦<|user|>⟧user|>⟦<|user|>⟧,<|user|>|>\n"
        "⟦<|user|>⟧a b⟦<|user|>⟧,<|a b|>\n⟦<|bot|>⟧bot⟦<|bot|>⟧,⟦<|bot|>⟧\n<|x|><|x|>,<||>\n"
    )
    assert made(family, messages)[0] == written(wanted)


def test_roles_around_which_a_template_builds_tokens_can_still_be_compared() -> None:
    """The halves are marks while the template runs, which must not show."""
    family = Family(
        "{{ '<|' in messages[0].content }}{{ messages[0].content.split('<|') | length }}{{ '<|' | length }}"
        "{{ messages[0].content.startswith('<|') }}{{ '<|' == '<' ~ '|' }}{{ {'<|': 1}['<|'] }}<|",
        ("<|user|>",),
    )
    assert text(made(family, [user("<|x<|")])) == "True32TrueTrue1<|"


@pytest.mark.slow
def test_the_process_that_renders_makes_the_same_prompts() -> None:
    """PromptMaker with rows that can be rendered and rows that cannot, as structs and as JSON."""
    name = "mistral3"
    maker = PromptMaker(FAMILIES[name].setup())
    table = pa.table({"messages": pa.array([*map(json.dumps, CONVERSATIONS.values()), "[]", None])})
    outcomes = list(maker.make(table))
    assert dict(zip(CONVERSATIONS, outcomes, strict=False)) == expected(name)
    assert outcomes[-2:] == [(None, "column 'messages' holds no messages"), (None, "column 'messages' is null")]
    questions = pa.table({"messages": [CONVERSATIONS["question"], CONVERSATIONS["turns"], CONVERSATIONS["thoughts"]]})
    assert list(maker.make(questions)) == [expected(name)[title] for title in ("question", "turns", "thoughts")]
    maker.close()


@pytest.mark.slow
def test_the_process_gets_the_date_and_the_system_message_of_the_setup() -> None:
    maker = PromptMaker(FAMILIES["llama31"].setup(system="Be brief.\n"))
    assert list(maker.make(pa.table({"messages": [[user("Hello")]]}))) == [expected("llama31")["system"]]
    assert date.fromisoformat(DATE).strftime("%d %b %Y") in str(expected("llama31")["system"][0])
    maker.close()
