"""What a memory plan says: each device's share, and the rows and tokens of context that fit."""

from dataclasses import dataclass

from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, pages_for


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """One device's share, in bytes; stages on the same device are summed."""

    device: str
    free: int
    """Free when the plan was made, the weights already loaded."""
    kept_back: int
    """Of `free`, what stays free."""
    weights: int
    states_per_row: int
    kv_per_token: int
    """Keys and values of one token of context."""
    logits: int
    workspace: int
    """Largest temporaries of a forward."""
    graphs: int
    """What CUDA graphs keep."""

    def fixed(self, rows: int) -> int:
        """Bytes for so many rows before any context; prefixes have slots beside the rows'."""
        return self.states_per_row * (rows + PREFIX_SLOTS) + self.working

    @property
    def working(self) -> int:
        """Bytes for forwards under way."""
        return self.workspace + self.graphs + self.logits

    def kv_room(self, rows: int) -> int | None:
        """Tokens of context, in whole pages, that fit beside so many rows; below 0 where the rows themselves do not
        fit; None for no limit."""
        left = self.free - self.kept_back - self.fixed(rows)
        if left >= 0 and not self.kv_per_token:
            return None
        return left // (self.kv_per_token * PAGE_SIZE) * PAGE_SIZE if left >= 0 else -1

    def left(self, rows: int, kv_tokens: int) -> int:
        """Bytes still free with so many rows and pages for so many tokens of context."""
        return self.free - self.fixed(rows) - self.kv_per_token * pages_for(kv_tokens) * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the engine holds, and where the memory goes."""

    devices: tuple[DevicePlan, ...]
    max_rows: int
    kv_tokens: int

    def lines(self) -> list[str]:
        """A table to read: a line a device, and the rows and tokens that come out."""
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
