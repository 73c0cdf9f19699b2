"""Defines the memory plan: the rows and tokens of context that an engine holds, and each device's share of the memory
for them."""

from dataclasses import dataclass

from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, pages_for


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device's share of the memory plan, in bytes; stages on the same device are added up."""

    device: str
    free: int
    """Memory that was free when the plan was made, after the weights were loaded."""
    kept_back: int
    """The part of `free` that the plan leaves free."""
    weights: int
    """Memory that the loaded weights take; not part of `free`."""
    states_per_row: int
    """Mamba states of one slot."""
    kv_per_token: int
    """Keys and values of one token of context; 0 if the device has no attention layers."""
    logits: int
    """Logits of a lane's forward and their temporaries; 0 if the last stage is on another device."""
    workspace: int
    """The largest temporaries of a forward, apart from the logits."""
    graphs: int
    """Memory that CUDA graphs keep."""

    def fixed(self, rows: int) -> int:
        """Return the bytes that `rows` rows need without any attention context: the states of their slots and of the
        prefix slots, and what forwards need."""
        return self.states_per_row * (rows + PREFIX_SLOTS) + self.working

    @property
    def working(self) -> int:
        """Return the bytes that forwards need: temporaries, CUDA graphs and logits."""
        return self.workspace + self.graphs + self.logits

    def kv_room(self, rows: int) -> int | None:
        """Return how many tokens of attention context, in whole pages, fit if the engine holds `rows` rows. Return -1
        if the rows alone do not fit, and None if context takes no memory on this device."""
        left = self.free - self.kept_back - self.fixed(rows)
        if left >= 0 and not self.kv_per_token:
            return None
        return left // (self.kv_per_token * PAGE_SIZE) * PAGE_SIZE if left >= 0 else -1

    def left(self, rows: int, kv_tokens: int) -> int:
        """Return the bytes that stay free, `kept_back` included, with `rows` rows and pages for `kv_tokens` tokens of
        context in total; negative if they do not fit."""
        return self.free - self.fixed(rows) - self.kv_per_token * pages_for(kv_tokens) * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The rows and tokens of context that the engine holds, and the memory that each device uses for them."""

    devices: tuple[DevicePlan, ...]
    max_rows: int
    kv_tokens: int
    """Tokens of attention context for all rows together."""

    def lines(self) -> list[str]:
        """Return a readable table: a line of headings, one line per device, then max_rows and kv_tokens."""
        heads: tuple[str, ...] = ("device", "weights", "free now", "states/row", "KV/token", "all states", "all KV")
        heads += ("logits", "workspace", "graphs", "left then")
        table: list[tuple[str, ...]] = [heads]
        for plan in self.devices:
            all_kv = plan.kv_per_token * pages_for(self.kv_tokens) * PAGE_SIZE
            states = plan.states_per_row * (self.max_rows + PREFIX_SLOTS)
            sizes = (plan.weights, plan.free, plan.states_per_row, plan.kv_per_token, states, all_kv)
            last = (plan.logits, plan.workspace, plan.graphs, plan.left(self.max_rows, self.kv_tokens))
            table.append((plan.device, *(size_text(count) for count in sizes + last)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return [*lines, f"max_rows {self.max_rows}, kv_tokens {self.kv_tokens:,}"]


def size_text(count: float) -> str:
    """Return a number of bytes as text with a binary unit, such as `1.5 KiB` or `21.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 10_000 else f"{count / 1024:,.0f} TiB"
