"""Tests builtin:tiny: its tasks and corpus, that training and engine compute the same, that training which was stopped
continues as if it had not been, and that the committed checkpoint writes right answers."""

import datetime
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import GenerationParams, load_model
from model.builtin import phase, tasks, trainable
from model.builtin.bpe import EOS, MASK, train_tokenizer
from model.builtin.corpus import Batch, Corpus, Rows, held_out_examples, mask_blocks, training_rows
from model.builtin.parameters import Weights, checkpoint_names, fresh_weights, with_time
from model.builtin.phase import Phase, run_phase
from model.builtin.recipe import CONFIG, SEED, VOCAB_SIZE, Recipe
from model.builtin.train import TOKENIZER_EXAMPLES, context_loss
from model.builtin.trainable import CHUNK, Blocks, Layout
from model.checkpoint.config import TwoTowerConfig
from model.checkpoint.reader import BUILTIN, open_checkpoint
from model.checkpoint.writer import write_checkpoint
from tests.benchmarks.quality.measure import generate, score

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONFIGURED = TwoTowerConfig.from_dict(CONFIG)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    content = open_checkpoint("builtin:tiny").tokenizer_json()
    assert content is not None
    return Tokenizer.from_buffer(content)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Batch:
    made = training_rows(tokenizer, seed=1, count=6)
    return {name: torch.from_numpy(getattr(made, name)) for name in Rows.__slots__}


def test_the_checkpoint_is_small_complete_and_made_of_the_recipe() -> None:
    checkpoint = open_checkpoint("builtin:tiny")
    checkpoint.validate("both")
    folder = BUILTIN["tiny"]
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 8 * 10**6
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert json.loads((folder / "config.json").read_text()) == dict(CONFIG)


def test_the_tokenizer_is_that_of_the_command_and_knows_every_word(tokenizer: Tokenizer) -> None:
    texts = (e.prompt + e.answer for e in itertools.islice(tasks.examples(SEED, held_out=False), TOKENIZER_EXAMPLES))
    assert json.loads(train_tokenizer(texts, VOCAB_SIZE).to_str()) == json.loads(tokenizer.to_str())
    lexicon = (*tasks.NAMES, *tasks.CITIES, *tasks.JOBS, *tasks.ITEMS, *tasks.WORDS, *tasks.MONTHS)
    assert {len(tokenizer.encode(f" {word}").ids) for word in lexicon} == {1}
    assert tokenizer.decode(tokenizer.encode("Zoë, 3 µm\n").ids) == "Zoë, 3 µm\n"


def test_no_question_is_both_trained_on_and_held_out() -> None:
    def questions(held_out: bool) -> set[str]:
        some = itertools.islice(tasks.examples(3, held_out=held_out), 3000)
        return {example.prompt.rsplit("\n\n", 1)[-1] for example in some}

    assert not questions(held_out=True) & questions(held_out=False)
    assert {e.task for e in itertools.islice(tasks.examples(3, held_out=True), 200)} == set(tasks.TASKS)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_answers_follow_from_their_questions(name: str) -> None:
    """The answers of each task are right; the test computes them by other means."""
    some = (e for e in tasks.examples(4, held_out=True) if e.task == name)
    for example in itertools.islice(some, 20):
        question, answer = example.prompt.rsplit("\n\n", 1)[-1].removesuffix(tasks.PROMPT_END), example.answer
        numbers = [int(digits) for digits in re.findall(r"\d+", question)]
        if name == "record":
            assert all(str(value) in question for value in json.loads(answer).values())
        elif name == "sum":
            assert answer.endswith(f"The sum is {sum(numbers):03}.")
        elif name == "count":
            first, step = numbers
            assert answer == f" {', '.join(str(n) for n in range(first, first + 8 * step, step))}."
        elif name == "series":
            *given, _, near, far = numbers
            digits = [int(digit) for digit in answer.split()]
            assert digits[:4] == given
            assert digits.index(0) == len(digits) - 1
            windows = [digits[i - 4 : i + 1] for i in range(4, len(digits))]
            assert all((window[-1 - near] + window[-1 - far]) % 10 == window[-1] for window in windows)
        elif name == "sort":
            words = answer.removeprefix(" In order: ").split(".")[0].split(", ")
            assert words == sorted(question.split(": ")[1].split(", "))
        elif name == "unit":
            one, factor, count, product = (int(digits) for digits in re.findall(r"\d+", answer.replace("One", "1")))
            assert (one, [count], product) == (1, numbers, factor * count)
        elif name == "date":
            date = datetime.date.fromisoformat(question.split()[-1])
            assert answer.startswith(f" It is {date:%d %B %Y}, in America {date:%m/%d/%Y}")
        else:
            facts = dict(fact.split(" ") for fact in question.split(": ")[1].split(", "))
            assert all(value in answer for value in facts.values())


def test_a_row_holds_whole_documents_whose_completions_begin_with_a_chunk(tokenizer: Tokenizer, rows: Batch) -> None:
    for row in range(len(rows["ids"])):
        for number in rows["document"][row].unique():
            chunks = (rows["document"][row] == number).nonzero().flatten()
            tokens = torch.arange(chunks[0] * CHUNK, (chunks[-1] + 1) * CHUNK)
            live = rows["live"][row, tokens]
            if not live.any():
                continue  # the unused rest of the row
            text = tokenizer.decode(rows["ids"][row, tokens][live].tolist())
            assert tasks.PROMPT_END in text
            first = int(rows["is_block"][row, chunks].nonzero()[0]) * CHUNK
            assert tokenizer.decode(rows["ids"][row, tokens][:first].tolist()).endswith(tasks.PROMPT_END)
            assert rows["ids"][row, tokens][live][-1] == EOS
            assert (rows["ids"][row, tokens][live] == EOS).sum() == 1


def test_blocks_are_masked_as_the_schedule_says(rows: Batch) -> None:
    recipe = Recipe(steps=1, decay_from=0.5, blocks=200)
    batch = mask_blocks(rows, recipe, seed=5)
    counts = batch["masked"].sum(-1)
    torch.testing.assert_close(counts / CHUNK, batch["t"])
    assert set(counts.unique().tolist()) == set(range(1, CHUNK + 1))
    full = recipe.all_masked + (1 - recipe.all_masked) / CHUNK
    assert (counts == CHUNK).float().mean().item() == pytest.approx(full, abs=0.05)
    assert rows["is_block"].gather(1, batch["chunk"]).all()


def test_some_blocks_are_masked_from_a_position_on(rows: Batch) -> None:
    """The share of blocks that are masked from a position on is as the recipe says; all other blocks are those of a
    recipe without it."""
    plain = Recipe(steps=1, decay_from=0.5, blocks=200)
    usual, some = (mask_blocks(rows, recipe, seed=5) for recipe in (plain, replace(plain, tail_masked=0.4)))
    changed = (usual["masked"] != some["masked"]).any(-1)
    assert changed.float().mean().item() == pytest.approx(0.4 * (1 - 0.25 - 2 * 0.75 / CHUNK), abs=0.05)
    assert (some["masked"][changed].int().diff(dim=-1) >= 0).all()
    torch.testing.assert_close(some["masked"].sum(-1) / CHUNK, some["t"])


def test_training_and_engine_compute_the_same(tmp_path: Path, tokenizer: Tokenizer, rows: Batch) -> None:
    """With random weights in every part, training over packed rows gives the logits that the engine gives for one
    document at a time, for both towers."""
    generator = torch.Generator().manual_seed(1)

    def shaken(weights: Weights) -> Weights:
        noise = {name: torch.randn(value.shape, generator=generator) for name, value in weights.items()}
        return {name: (value + 0.05 * noise[name]).bfloat16().float() for name, value in weights.items()}

    context = shaken(fresh_weights(CONFIGURED, 0))
    denoiser = shaken(with_time(CONFIGURED, context, 0))
    tensors = checkpoint_names(context, "context_tower", "context_lm_head")
    tensors |= checkpoint_names(denoiser, "denoiser_tower", "lm_head")
    write_checkpoint(tmp_path, CONFIG, json.loads(tokenizer.to_str()), tensors)
    pair = load_model(str(tmp_path))

    batch = mask_blocks(rows, Recipe(steps=1, decay_from=0.5, blocks=4), seed=2)
    layout, chunk = Layout(batch["document"], batch["real"]), batch["chunk"]
    targets = batch["ids"].unflatten(1, (-1, CHUNK))[torch.arange(len(chunk))[:, None], chunk]
    blocks = targets.masked_fill(batch["masked"], MASK)
    with torch.no_grad():
        hidden, seeds = trainable.context(CONFIGURED, context, batch["ids"], layout, [])
        logits = F.linear(hidden, context["head"])
        denoised = trainable.denoiser(CONFIGURED, denoiser, blocks, Blocks(chunk, batch["t"]), seeds, layout, [])
        denoised = F.linear(denoised, denoiser["head"])
    place = torch.arange(batch["ids"].shape[1])
    for row in range(0, len(chunk), 2):
        document = batch["document"][row].repeat_interleave(CHUNK)
        for k in range(chunk.shape[1]):
            begin = chunk[row, k] * CHUNK
            before = ((document == document[begin]) & batch["real"][row] & (place < begin)).nonzero().flatten()
            ids = batch["ids"][row, before].tolist()
            torch.testing.assert_close(pair.context_logits(ids), logits[row, before], atol=2e-4, rtol=1e-3)
            got = pair.denoiser_logits(ids, blocks[row, k].tolist(), batch["t"][row, k].item())
            torch.testing.assert_close(got, denoised[row, k], atol=2e-4, rtol=1e-3)


class _FewRows(Corpus):
    """A corpus of two rows that are used in turns."""

    def __init__(self, rows: Batch) -> None:
        self._both = rows

    def batch(self, step: int, rows: int) -> Batch:
        return {name: value[step % 2 : step % 2 + rows] for name, value in self._both.items()}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/point", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_stopped_phase_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, rows: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phase, "SAVE_EVERY", 2)
    recipe, start = Recipe(steps=4, rows=1, warmup=1, decay_from=0.3), fresh_weights(CONFIGURED, 0)
    calls = 0

    def loss(weights: Weights, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return context_loss(CONFIGURED, weights, batch)

    def stopping(weights: Weights, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return loss(weights, batch)

    unbroken = Phase("unbroken", recipe, start, tmp_path, CPU)
    run_phase(unbroken, _FewRows(rows), loss)
    stopped = Phase("stopped", recipe, start, tmp_path, CPU)
    with pytest.raises(KeyboardInterrupt):
        run_phase(stopped, _FewRows(rows), stopping)
    resumed = Phase("stopped", recipe, start, tmp_path, CPU)
    assert resumed.step == 2
    run_phase(resumed, _FewRows(rows), loss)
    for name, value in unbroken.average.items():
        np.testing.assert_array_equal(resumed.average[name].detach().numpy(), value.detach().numpy(), name)
    assert any((unbroken.average[name] != value).any() for name, value in start.items())


def test_it_writes_right_answers(tokenizer: Tokenizer) -> None:
    """The model answers most of 64 held-out prompts correctly; the exact shares, over 1,024 prompts, are in the README
    (`make quality`)."""
    torch.set_num_threads(1)
    pair = load_model("builtin:tiny")
    examples = held_out_examples(tokenizer, seed=2, count=64)
    ar = generate(pair, examples, GenerationParams(mode="ar", max_new_tokens=256, eos_ids=(EOS,)))
    diffusion = generate(
        pair, examples, GenerationParams(max_new_tokens=256, eos_ids=(EOS,), confidence_threshold=0.99)
    )
    assert score(examples, ar, ar).exact_match >= 0.85
    found = score(examples, diffusion, ar)
    assert found.exact_match >= 0.85
    assert found.tokens_per_forward is not None
    assert found.tokens_per_forward >= 2.42
    assert min(found.blocks_by_steps) == 1
    assert max(found.blocks_by_steps) >= 12
    assert len(found.blocks_by_steps) >= 6  # some blocks are known at once, others take a step for each link of a chain
