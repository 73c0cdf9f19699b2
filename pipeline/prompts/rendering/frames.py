"""Defines the messages between pipeline.prompts.renderer and the process that renders templates.

to the process     the setup as JSON, then record batches as Arrow streams, each preceded by its length (LENGTH)
from the process   READY, then one frame for each row: PROMPT or MARKED with the prompt, or REASON with the reason why
                   there is none. A frame begins with its kind and the length of its content (FRAME).

Lengths are in bytes.
"""

import json
import struct
from dataclasses import asdict

from pipeline.prompts.setup import ChatSetup, PromptSetup
from pipeline.prompts.values import Prompt

LENGTH, FRAME = struct.Struct("<Q"), struct.Struct("<BQ")
READY, PROMPT, MARKED, REASON = range(4)
"""The kinds of frames. PROMPT has the text of a prompt without control tokens; MARKED has the number of control tokens,
their ranges and the text."""
NO_MEMORY = 3
"""The exit status of the process if it runs out of memory."""
_COUNT = struct.Struct("<I")


def pack_setup(setup: PromptSetup) -> bytes:
    """Return the message that tells the process how prompts are made."""
    return json.dumps(asdict(setup)).encode()


def unpack_setup(data: bytes) -> PromptSetup:
    """Return the setup in a message of pack_setup."""
    fields = json.loads(data)
    chat = fields.pop("chat")
    fields |= {name: tuple(fields[name]) for name in ("columns", "control_tokens")}
    return PromptSetup(**fields, chat=None if chat is None else ChatSetup(**chat))


def pack_prompt(prompt: Prompt) -> tuple[int, bytes]:
    """Return the kind and the content of the frame of a prompt. Raises UnicodeEncodeError if it has lone surrogates."""
    text = prompt.text.encode()
    if not prompt.control:
        return PROMPT, text
    numbers = [number for span in prompt.control for number in span]
    return MARKED, struct.pack(f"<{1 + len(numbers)}I", len(prompt.control), *numbers) + text


def unpack_prompt(kind: int, content: bytes) -> Prompt:
    """Return the prompt in the content of a PROMPT or MARKED frame."""
    if kind == PROMPT:
        return Prompt(content.decode())
    (count,) = _COUNT.unpack_from(content)
    numbers = struct.unpack_from(f"<{2 * count}I", content, _COUNT.size)
    text = content[_COUNT.size * (1 + 2 * count) :].decode()
    return Prompt(text, tuple(zip(numbers[::2], numbers[1::2], strict=True)))
