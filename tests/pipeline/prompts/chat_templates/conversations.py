"""Conversations that all chat templates of this folder are rendered with, and a generator of others."""

import random
from typing import Any

Messages = list[dict[str, Any]]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(number: int, content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05}"}


SYSTEM = {"role": "system", "content": "Be brief.\n"}
WEATHER = {"city": "Köln <b>", "days": 2}
CONVERSATIONS: dict[str, Messages] = {
    "question": [user("Is 1 < 2 & 'so' \"on\"?")],
    "system": [SYSTEM, user("Hello")],
    "turns": [user(" Hello\n"), assistant("\n\nHi there "), user("How are\n\nyou?")],
    "thoughts": [
        user("2 + 2?"),
        assistant("<think>\nEasy.\n</think>\n\nFour."),
        user("And 3?"),
        assistant("<think>Hm.</think>Five."),
    ],
    "null content": [user("Hello"), assistant(None), user("Still there?")],
    "call": [user("Rain?"), assistant(None, tool_calls=[call(1, "weather", WEATHER)])],
    "call with text": [
        user("Rain?"),
        assistant(None, tool_calls=[call(1, "weather", '{"city": "Köln"}')]),
        result(1, '{"rain": false}'),
    ],
    "calls": [
        user("Rain?"),
        assistant("I look.", tool_calls=[call(1, "weather", WEATHER), call(2, "time", {"zone": "CET"})]),
        result(1, "no"),
        result(2, "12:00"),
        assistant("No rain."),
        user("Thanks"),
    ],
    "parts": [user([{"type": "text", "text": "One, "}, {"type": "text", "text": "two"}])],
    "unknown role": [user("Hello"), {"role": "critic", "content": "Bad."}],
}

_PIECES = (
    *("a", "Ω", "日本語", "😀", "é", "1", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\u2028", "\u00a0", "\u200b", "\x1f"),
    *("'", '"', "\\", "\\n", "<", ">", "&", "&amp;", "<b>", "</", "<|", "|>", "{{ x }}", "{% if %}", "{#", "%s", "{0}"),
    *("$1", "None", "null", "user ", "/no_think", "\U00100000", "\U000f0000", "\U000ff001", "[", "]"),
)


def text(rng: random.Random) -> str:
    """Return a random text; no piece of it, nor two of them together, spell a control token of any family."""
    return "".join(rng.choices(_PIECES, k=rng.choice((0, 1, 2, 5, 12))))


def conversation(rng: random.Random) -> Messages:
    """Return random messages: mostly turns of user and assistant, some with calls of tools, names or odd roles."""
    messages: Messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.4 else []
    for turn in range(rng.randint(1, 4)):
        messages.append(user(text(rng)))
        if rng.random() < 0.1:
            messages[-1]["name"] = rng.choice(("Ada", "Bob"))
        if rng.random() < 0.3:
            arguments = {"a": text(rng), "b": rng.choice((0, -7, 2**40)), "c": [text(rng)], "d": rng.random() < 0.5}
            calls = [call(10 * turn + i, "find", arguments) for i in range(rng.choice((1, 1, 2)))]
            messages.append(assistant(text(rng), tool_calls=calls))
            messages += [result(10 * turn + i, text(rng)) for i in range(len(calls))]
        if turn or rng.random() < 0.7:
            fields = {"reasoning_content": text(rng)} if rng.random() < 0.2 else {}
            messages.append(assistant(text(rng), **fields))
    if messages[-1]["role"] == "assistant" and rng.random() < 0.8:
        messages.append(user(text(rng)))
    if rng.random() < 0.1:
        messages.insert(
            rng.randrange(len(messages)), {"role": rng.choice(("critic", "stop", "comment")), "content": "x"}
        )
    return messages
