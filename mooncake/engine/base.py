"""The two levels of an engine.

*Engine* (request level) takes jobs and gives outputs; services and the Conductor know nothing else. *StepEngine* runs one
step plan on real or simulated hardware; `EngineCore` (`mooncake.engine.core`) plans its steps, which makes it an Engine.

One step is one forward pass over a packed batch: for each item the tokens [start, start + count) of its sequence. An item
that reaches the sequence's last known token draws the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np

from mooncake.core.types import CostModel, Job, SamplingParams, TokenLogprobs


class KvLayout(msgspec.Struct, frozen=True):
    """How KV lies in pages and objects: [layer][token][token_bytes]; a token's bytes of one layer are opaque to the store.

    An object of t tokens has num_layers * t * token_bytes bytes, layer 0 first."""

    num_layers: int
    token_bytes: int
    """Bytes of one token in one layer: 2 * kv_heads * head_dim * itemsize for K and V, or the MLA latent."""
    dtype: str
    name: str
    """Names the meaning of the bytes, such as kv.3x64 or mla.512+64; goes into the shard of object keys."""

    def object_bytes(self, num_tokens: int) -> int:
        return self.num_layers * num_tokens * self.token_bytes


class EngineLimits(msgspec.Struct, frozen=True):
    num_pages: int
    page_tokens: int
    block_tokens: int
    max_batch: int
    """Sequences in one step."""
    max_step_tokens: int
    """Prefill tokens in one step; decode tokens come on top, at most max_batch."""
    max_context: int
    """Longest sequence of prompt and output, in tokens."""


class StepItem(msgspec.Struct, frozen=True):
    """Compute tokens [start, start + count) of sequence `seq`; its KV of [0, start) is in its pages.

    pages: the engine pages of the sequence in order, enough for start + count tokens.
    sample: whether the last computed token is the last known one, so that the next token is drawn, at absolute position
    start + count.
    num_loading: tokens of [0, start) whose KV may still be arriving: layer l of the forward waits for layer l of the load.
    """

    seq: int
    start: int
    count: int
    pages: np.ndarray
    sample: bool
    num_loading: int = 0


class StepPlan(msgspec.Struct, frozen=True):
    """One step: the decode batch computes a token of each of its sequences, and the other items their chunks.

    items: the decode batch's (unless the engine core was told not to list them), oldest first, then the others.
    num_decode, num_context: sequences of the decode batch, and known tokens of all of them together.
    joined: sequences that were not in the decode batch of the last plan.
    horizon: number of successive steps for which the plan stays valid; more than 1 only if there is nothing but the batch."""

    items: tuple[StepItem, ...]
    horizon: int = 1
    num_decode: int = 0
    num_context: int = 0
    joined: tuple[int, ...] = ()


class StepResult(msgspec.Struct, frozen=True):
    """tokens[i]: drawn tokens of items[i], empty where `sample` is false; logprobs likewise or empty. Of a joint sequence they
    are its choices' first tokens.

    failed: sequences whose load failed while the step waited for it, or whose computation failed; their drawn tokens are void.
    lost: sequences whose grammar cannot be followed, with the reason; theirs are void too.
    step_ns: duration of the step (mean of the steps if several were run).

    num_steps: how many steps were run, at most the plan's horizon. told: of decode sequences that the plan does not list, all
    tokens that were not told yet, at successive positions. Who is in neither drew tokens that will be told later; none of these
    ends its sequence. Only the last of several tokens may end one."""

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    failed: tuple[int, ...] = ()
    step_ns: int = 0
    num_steps: int = 1
    told: tuple[tuple[int, tuple[int, ...]], ...] = ()
    lost: tuple[tuple[int, str], ...] = ()

    def faults(self) -> dict[int, tuple[str, str]]:
        """Of the sequences that have no token to show: reason and detail, as in `AttemptFailed`."""
        found = dict.fromkeys(self.failed, ("engine_error", "the engine could not compute this sequence"))
        return found | {seq: ("grammar", detail) for seq, detail in self.lost}


class LayerLoad(Protocol):
    """A load under way, filled layer by layer by another thread."""

    def wait(self, layer: int) -> bool:
        """Blocks until layer `layer` is in the pages; False if the load failed. Bounded by the load's own deadline."""
        ...


LayerHook = Callable[[int], None]
"""Called after layer l's KV of all items of the running plan is in the pages. It enqueues and never blocks."""


class StepEngine(Protocol):
    """Runs step plans. All methods are called from one engine thread, except `read_pages` and `write_pages`, which copy
    threads call for pages that no running step writes."""

    layout: KvLayout
    limits: EngineLimits
    vocab_size: int

    def add_sequence(
        self,
        seq: int,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        sampling: SamplingParams,
        choice: int,
        num_choices: int = 1,
    ) -> None:
        """Make a sequence known: its tokens so far (prompt, then generated) and how to draw more. The engine appends the
        tokens it draws itself. num_choices: more than 1 makes it a joint sequence, which draws once: a token for each choice
        from `choice` on, all from the same logits."""
        ...

    def remove_sequence(self, seq: int) -> None: ...

    def run(self, plan: StepPlan, after_layer: LayerHook | None, loads: Mapping[int, LayerLoad]) -> StepResult:
        """One forward pass. `loads`: by sequence, the loads that items with num_loading wait for. Raises only on a fault of
        the whole engine; a single sequence's fault is reported in `failed`."""
        ...

    def read_pages(self, layer: int, pages: np.ndarray, start: int, count: int, out: memoryview) -> None:
        """Copy the KV of tokens [start, start + count) of a sequence with these pages, one layer, to `out`
        (count * token_bytes bytes). No Python loop per page."""
        ...

    def write_pages(self, layer: int, pages: np.ndarray, start: int, count: int, data: memoryview) -> None:
        """The opposite of read_pages."""
        ...

    def measure(self) -> CostModel:
        """Calibrate: run a few steps of several sizes and fit the time model. Called once before the instance is ready."""
        ...

    def close(self) -> None: ...


class KvReader(Protocol):
    """Leased objects of one sequence. Errors are `MooncakeError`s."""

    num_tokens: int

    def use(self, index: int, offset: int, size: int, use: Callable[[memoryview], None]) -> None:
        """Call `use` with that range of object `index`; the bytes are valid during the call."""
        ...


class SourceKvReader(KvReader, Protocol):
    """Of a sequence's source. ssd_tokens: of its tokens, those that were read from SSD for it."""

    ssd_tokens: int


class KvWriter(Protocol):
    """Reserved objects of one sequence. Errors are `MooncakeError`s. num_stored: leading ones that exist already."""

    num_tokens: int
    num_stored: int

    def wants(self, index: int) -> bool:
        """False where the object exists already."""
        ...

    def fill(self, index: int, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
        """Call `fill` with a buffer whose bytes become that range of object `index`."""
        ...


class Engine(Protocol):
    """Request level. What happens is told by `EngineProgress` and `KvStored` (`mooncake.engine.attempts`), in order, from
    threads of the engine; the last word on each submitted sequence is `SequenceReleased`."""

    def submit(
        self,
        seq: int,
        job: Job,
        *,
        one_token: bool,
        reader: SourceKvReader | None = None,
        writer: KvWriter | None = None,
        turn: int = 0,
    ) -> None:
        """Never blocks. one_token: draw one token and end. reader: where the KV of its leading tokens can be loaded; writer:
        where the KV of its known tokens goes. Both are used until `SequenceReleased`. turn: the lower, the sooner, before any
        priority."""
        ...

    def load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int, reader: KvReader) -> None:
        """Never blocks. Load these leading blocks of a sequence that will be submitted later, if there is room for them and
        those up to token `start` are still there. The reader is used until `AheadEnded`."""
        ...

    def list_blocks(self) -> None:
        """Never blocks. Answered by an `EngineProgress` with the keys of all cached blocks."""
        ...

    def abort(self, seq: int) -> None:
        """Unknown and ended sequences are ignored."""
        ...

    def close(self) -> None:
        """Ends the engine's threads; what still runs is dropped."""
        ...
