"""Defines the memory plan: each device's share, and the rows and tokens of context that fit."""

from dataclasses import dataclass

from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, pages_for


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device's share, in bytes; stages on the same device are added up."""

    device: str
    free: int
    """Memory that was free when the plan was made, after the weights were loaded."""
    kept_back: int
    """The part of `free` that stays free."""
    weights: int
    states_per_row: int
    kv_per_token: int
    """Keys and values of one token of context."""
    logits: int
    workspace: int
    """The largest temporaries of a forward."""
    graphs: int
    """Memory that CUDA graphs keep."""

    def fixed(self, rows: int) -> int:
        """Return the bytes for so many rows without any context; the slots of prefixes are included."""
        return self.states_per_row * (rows + PREFIX_SLOTS) + self.working

    @property
    def working(self) -> int:
        """Bytes that forwards need while they run."""
        return self.workspace + self.graphs + self.logits

    def kv_room(self, rows: int) -> int | None:
        """Return how many tokens of context, in whole pages, fit if the engine holds `rows` rows. Return -1 if the rows
        alone do not fit, and None if context takes no memory on this device."""
        left = self.free - self.kept_back - self.fixed(rows)
        if left >= 0 and not self.kv_per_token:
            return None
        return left // (self.kv_per_token * PAGE_SIZE) * PAGE_SIZE if left >= 0 else -1

    def left(self, rows: int, kv_tokens: int) -> int:
        """Return the bytes that stay free with so many rows and pages for so many tokens of context."""
        return self.free - self.fixed(rows) - self.kv_per_token * pages_for(kv_tokens) * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The rows and tokens of context that the engine holds, and the memory that each device uses for them."""

    devices: tuple[DevicePlan, ...]
    max_rows: int
    kv_tokens: int

    def lines(self) -> list[str]:
        """Return a readable table: one line per device, then the rows and tokens that fit."""
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
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 10_000 else f"{count / 1024:,.0f} TiB"
