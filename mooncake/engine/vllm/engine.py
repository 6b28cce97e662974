"""vLLM as an `Engine` of our services: its AsyncLLM in a thread of its own, whose event loop does all that is done here.

KV moves by the connector, in vLLM's own processes; here it is only told which keys to use. So a reader or a writer of a
sequence is not read or written, but says that the objects are leased, or wanted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from mooncake.config import Config, RoleConfig, socket_address
from mooncake.core.clock import monotonic
from mooncake.core.errors import ProcessError
from mooncake.core.types import CostModel, Job, KvSource, Role, TokenLogprobs, bytes_to_tokens
from mooncake.engine.attempts import EngineProgress, KvStored
from mooncake.engine.base import EngineLimits, KvLayout, KvReader, KvWriter, SourceKvReader
from mooncake.engine.core import AheadEnded, ServiceOutput
from mooncake.engine.host import EngineCounts, OnFailure, OnProgress
from mooncake.engine.kv_objects import StoredTarget
from mooncake.engine.threads import start_thread
from mooncake.engine.vllm.arguments import connector_options, engine_arguments, sampling_params
from mooncake.engine.vllm.books import SequenceBooks, Tokens
from mooncake.engine.vllm.events import CachedBlocks, Keys, salt_of
from mooncake.engine.vllm.feed import EventFeed
from mooncake.engine.vllm.layout import KvShape
from mooncake.engine.vllm.measure import measure
from mooncake.engine.vllm.options import read_layout, read_options, resolve
from mooncake.engine.vllm.requests import FAULT, PARAMS, HandOver
from mooncake.engine.vllm.versions import check_version

log = logging.getLogger(__name__)

_WATCH_S = 0.5
"""How often to look whether vLLM's engine process lives, while nothing is asked of it."""
_MEASURE_S = 300.0
_SHUTDOWN_S = 0.5
"""For vLLM's engine process to end by itself."""
_CLOSE_S = 10.0


def build_vllm(config: Config, role: RoleConfig, fingerprint: str) -> VllmHost:
    """Raises ImportError where vLLM is not, ConfigError or ProcessError."""
    import vllm

    check_version(vllm.__version__)
    endpoints = tuple(_endpoint(config, f"{role.name}-{kind}") for kind in ("events", "replay"))
    loop = _LoopThread(config.timeouts.start_s)
    try:
        llm = loop.call(_start(config, role, endpoints), config.timeouts.start_s)
    except BaseException:
        loop.close(None)
        raise
    place, _ = resolve(read_options(connector_options(config, role)))
    with place.connect(role.name) as store:
        shape = read_layout(store, fingerprint)
    return VllmHost(config, loop, llm, shape, endpoints)


def _endpoint(config: Config, name: str) -> str:
    """In the private run folder: events tell what prompts are made of."""
    path = socket_address(config.run_dir, name).removeprefix("unix:")
    if os.path.exists(path):
        os.unlink(path)
    return f"ipc://{path}"


async def _start(config: Config, role: RoleConfig, endpoints: Sequence[str]) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_vllm_config(engine_arguments(config, role, endpoints), disable_log_stats=True)
    except (ValueError, RuntimeError) as error:
        raise ProcessError(f"vLLM did not start: {error}") from error


class VllmHost:
    """An `EngineHost`. shard: of the objects of its first worker; a block is there if all workers' are."""

    stores_itself = True

    def __init__(self, config: Config, loop: _LoopThread, llm: Any, shape: KvShape, endpoints: Sequence[str]) -> None:
        cache, scheduler = llm.vllm_config.cache_config, llm.vllm_config.scheduler_config
        self.layout = KvLayout(shape.layers, shape.token_bytes, shape.dtype, shape.name)
        self.shard = shape.shard(0, 0)
        self.limits = EngineLimits(
            num_pages=cache.num_gpu_blocks - 1,  # vLLM keeps one
            page_tokens=cache.block_size,
            block_tokens=config.block_tokens,
            max_batch=scheduler.max_num_seqs,
            max_step_tokens=scheduler.max_num_batched_tokens,
            max_context=llm.vllm_config.model_config.max_model_len,
        )
        self._books = SequenceBooks(self.limits)
        self._loop = loop
        self._llm = llm
        self._endpoints = endpoints

    def measure(self) -> CostModel:
        async def generate(prompt: Sequence[int], num_tokens: int, salt: str) -> AsyncIterator[int]:
            text = {"prompt_token_ids": list(prompt), "cache_salt": f"measure.{salt}"}
            params = sampling_params(None, num_tokens, {PARAMS: {}})
            async for output in self._llm.generate(text, params, f"measure.{salt}.{monotonic()}"):
                yield len(output.outputs[0].token_ids)

        async def calibrate() -> CostModel:
            cost = await measure(generate, self.limits, monotonic)
            await self._llm.reset_prefix_cache()
            return cost

        cost: CostModel = self._loop.call(calibrate(), _MEASURE_S)
        return cost

    def start(self, role: Role, limits: EngineLimits, on_progress: OnProgress, on_failure: OnFailure) -> VllmEngine:
        return VllmEngine(self._loop, self._llm, self._books, self._endpoints, on_progress, on_failure)

    def counts(self) -> EngineCounts:
        return EngineCounts(self._books.load)

    def refusal(self, job: Job) -> str | None:
        return self._books.refusal(job)

    def take_role(self, role: Role, limits: EngineLimits, on_replaced: Callable[[], None]) -> None:
        """vLLM does the same in all roles."""
        self._loop.post(on_replaced)


class VllmEngine:
    """An `Engine`."""

    def __init__(
        self,
        loop: _LoopThread,
        llm: Any,
        books: SequenceBooks,
        endpoints: Sequence[str],
        on_progress: OnProgress,
        on_failure: OnFailure,
    ) -> None:
        self._loop = loop
        self._llm = llm
        self._books = books
        self._on_progress = on_progress
        self._on_failure = on_failure
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._blocks = CachedBlocks(books.limits.block_tokens)
        self._outputs: list[ServiceOutput] = []
        self._added: list[bytes] = []
        self._removed: list[bytes] = []
        self._cached: Keys | None = None
        self._told_at: int | None = None
        self._is_due = False
        self._broken = False
        self._watchers = [loop.start(self._watch()), loop.start(self._read_events(endpoints))]

    # ------------------------------------------------------------------ from any thread

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
        """turn: not heeded, as vLLM takes requests in the order in which they come."""
        self._loop.post(lambda: self._submit(seq, job, one_token, reader, writer))

    def load_ahead(self, seq: int, block_keys: tuple[bytes, ...], start: int, reader: KvReader) -> None:
        """vLLM gives pages to requests only."""
        self._loop.post(lambda: self._tell([AheadEnded(seq)]))

    def list_blocks(self) -> None:
        self._loop.post(self._list_blocks)

    def abort(self, seq: int) -> None:
        self._loop.post(lambda: self._abort(seq))

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        self._loop.close(self._llm)

    # ------------------------------------------------------------------ in the loop

    def _submit(
        self, seq: int, job: Job, one_token: bool, reader: SourceKvReader | None, writer: KvWriter | None
    ) -> None:
        ssd_tokens = 0 if reader is None else reader.ssd_tokens
        self._books.add(seq, job, one_token=one_token, has_reader=reader is not None, ssd_tokens=ssd_tokens)
        assert writer is None or isinstance(writer, StoredTarget)
        told = _hand_over(job, None if writer is None else writer.target, load=reader is not None)
        stored = None
        if writer is not None:
            stored = KvStored(seq, writer.num_stored * self._books.limits.block_tokens, writer.num_tokens)
        task = asyncio.get_running_loop().create_task(self._run(seq, job, told, stored))
        self._tasks[seq] = task
        task.add_done_callback(lambda _: self._ended(seq))

    def _ended(self, seq: int) -> None:
        """However it was: a task that is cancelled before it began has run nothing of its own."""
        del self._tasks[seq]
        self._tell(self._books.ended(seq))

    def _abort(self, seq: int) -> None:
        task = self._tasks.get(seq)
        if task is not None:
            task.cancel()

    def _list_blocks(self) -> None:
        self._cached = self._blocks.keys()
        self._tell([])

    async def _run(self, seq: int, job: Job, told: HandOver, stored: KvStored | None) -> None:
        """One sequence, to its end."""
        try:
            async for output in self._generate(seq, job, told):
                num_cached = output.num_cached_tokens or 0
                for each in output.outputs:
                    if each.finish_reason == "error":
                        raise _Refused(output.kv_transfer_params or {})
                    for tokens in _tokens(each, job):
                        self._tell(self._books.drawn(seq, tokens, num_cached))
            if stored is not None:
                self._flush()  # the tokens go first
                self._on_progress(stored)
        except asyncio.CancelledError:
            log.debug("sequence %d is aborted", seq)
        except _Refused as refused:
            self._tell(self._books.failed(seq, refused.reason, refused.detail))
        except Exception as error:  # vLLM's errors are of many families
            if self._llm.errored:
                self._break(error)
            else:
                log.warning("sequence %d failed", seq, exc_info=True)
                self._tell(self._books.failed(seq, "engine_error", f"{type(error).__name__}: {error}"))

    def _generate(self, seq: int, job: Job, told: HandOver) -> AsyncIterator[Any]:
        salt = salt_of(job.block_keys[0]) if job.block_keys else f"alone.{seq}"
        prompt = {"prompt_token_ids": bytes_to_tokens(job.token_ids), "cache_salt": salt}
        transfer = {PARAMS: msgspec.to_builtins(told, builtin_types=(bytes,))}
        params = sampling_params(job, self._books.max_tokens(seq), transfer)
        found: AsyncIterator[Any] = self._llm.generate(prompt, params, f"{seq}", priority=-job.priority)
        return found

    def _tell(self, outputs: Sequence[ServiceOutput]) -> None:
        """With all that comes in this round of the loop: the tokens of one step are one message."""
        self._outputs += outputs
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_due = False
        outputs, self._outputs = tuple(self._outputs), []
        added, self._added = tuple(self._added), []
        removed, self._removed = tuple(self._removed), []
        cached, self._cached = self._cached, None
        now, load = monotonic(), self._books.load
        step_ns = now - self._told_at if self._told_at is not None and load.num_running else 0
        self._told_at = now if load.num_running else None
        self._on_progress(EngineProgress(outputs, load, step_ns, added, removed, cached))

    async def _read_events(self, endpoints: Sequence[str]) -> None:
        await EventFeed(endpoints[0], endpoints[1], self._blocks, self._blocks_changed).run()

    def _blocks_changed(self, added: Keys, removed: Keys) -> None:
        self._added += added
        self._removed += removed
        self._tell([])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if self._llm.errored:
                self._break(ProcessError("vLLM's engine process is gone"))
                return

    def _break(self, error: BaseException) -> None:
        if not self._broken:
            self._broken = True
            self._on_failure(error)


class _Refused(Exception):
    """vLLM ended a request that it could not go on with. params: of its answer."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        fault = params.get(FAULT)
        self.reason = "grammar" if fault else "engine_error"
        self.detail: str = fault or "vLLM ended the request with an error"
        super().__init__(self.detail)


def _hand_over(job: Job, target: KvSource | None, *, load: bool) -> HandOver:
    """What is to be saved begins with what can be loaded."""
    objects = target or (job.source if load else None)
    grammar, generated = job.sampling.grammar, job.num_generated
    if objects is None:
        return HandOver(grammar=grammar, num_generated=generated)
    keys, tail = objects.block_keys, objects.partial_key
    return HandOver(objects.num_tokens, keys, tail, target is not None, load, grammar, generated)


def _tokens(output: Any, job: Job) -> list[Tokens]:
    """New tokens of a choice, or of all of a joint job: vLLM draws greedy ones once."""
    indices = range(job.num_choices) if job.joint and job.sampling.greedy else (output.index,)
    logprobs = _logprobs(output, job.sampling.num_logprobs)
    return [Tokens(index, tuple(output.token_ids), logprobs) for index in indices]


def _logprobs(output: Any, num_wanted: int | None) -> tuple[TokenLogprobs, ...]:
    if num_wanted is None or not output.logprobs:
        return ()
    found = []
    for token, position in zip(output.token_ids, output.logprobs, strict=True):
        best = sorted((each.rank, index, each.logprob) for index, each in position.items())[:num_wanted]
        found.append(TokenLogprobs(position[token].logprob, tuple((index, value) for _, index, value in best)))
    return tuple(found)


class _LoopThread:
    """A thread with an event loop. It lives as long as vLLM's engine process, which ends with the thread that started it."""

    def __init__(self, start_s: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = start_thread("vllm", self._run)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def post(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """Its result. Raises ProcessError if it takes longer."""
        found = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return found.result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise ProcessError(f"vLLM did not answer in {timeout_s:g} s") from None

    def close(self, llm: Any) -> None:
        """Ends vLLM, too."""

        async def end() -> None:
            try:
                for task in asyncio.all_tasks():
                    if task is not asyncio.current_task():
                        task.cancel()
                await asyncio.sleep(0)
                if llm is not None:
                    llm.shutdown(timeout=_SHUTDOWN_S)
            finally:
                self._loop.stop()

        self.start(end())
        self._thread.join(_CLOSE_S)
