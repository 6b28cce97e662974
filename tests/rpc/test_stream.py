"""Two ends drive each other: what one did, what the other saw, in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from mooncake.config import TlsConfig
from mooncake.core.errors import ConfigError, OutboxFull, ProtocolFault, Refused
from mooncake.core.messages import CacheSnapshot, Drain, Registered
from mooncake.rpc import stream
from mooncake.rpc.generated import mooncake_pb2 as pb
from tests.rpc.harness import End, Wire, dialling, hello, pair, run, serving

pytestmark = pytest.mark.quiet


def drains(count: int) -> list[Drain]:
    return [Drain(str(number)) for number in range(count)]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_both_ends_get_all_messages_in_order(kind: str, tmp_path: Path) -> None:
    async def test() -> None:
        address = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path}/s"
        async with pair(address) as (server, client):
            assert (server.link.peer, server.link.kind, client.link.peer) == ("client", "test", "server")
            for message in drains(300):
                client.link.send(message)
                server.link.send(message)
            await asyncio.gather(server.until_received(300), client.until_received(300))
            assert server.inbox == client.inbox == drains(300)
        assert server.events == ["open client", "close client"]
        assert client.events == ["open server", "close server"]

    run(test)


def test_a_writer_drains_its_queue_into_one_envelope() -> None:
    async def test() -> None:
        async with pair() as (server, client):
            for message in drains(100):
                client.link.send(message)
            await server.until_received(100)
            assert server.envelopes == [100]

    run(test)


def test_a_large_message_passes_and_one_over_the_limit_closes_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(count: int) -> CacheSnapshot:
        return CacheSnapshot("node", 1, 1, "dram", (bytes(16),) * count)

    async def test() -> None:
        async with pair() as (server, client):
            large = snapshot(300_000)
            client.link.send(large)
            await server.until_received(1)
            assert server.inbox == [large]
            monkeypatch.setattr(stream, "MAX_MESSAGE_BYTES", 1000)
            first = client.link
            first.send(snapshot(100))
            await client.until_event("open server", 2)
            assert isinstance(first.error, ProtocolFault) and "CacheSnapshot" in str(first.error)

    run(test)


# ---------------------------------------------------------------- the handshake


@pytest.mark.parametrize(
    ("mine", "reason"),
    [
        ({"token": "another"}, "wrong cluster token"),
        ({"compat": "theirs"}, "compat theirs of client is not ours of server"),
    ],
)
def test_who_is_not_wanted_is_told_why_and_tries_rarely(mine: dict[str, str], reason: str) -> None:
    async def test() -> None:
        server, client = End(hello("server", compat="ours")), End(hello("client", **mine))

        def admit(peer: stream.Hello) -> str | None:
            assert peer.token == ""
            same = peer.compat in ("", server.me.compat)
            return (
                None if same else f"compat {peer.compat} of {peer.peer} is not {server.me.compat} of {server.me.peer}"
            )

        async with serving(server, admit=admit) as at, dialling(client, at.address):
            await client.until_event("refused")
            await asyncio.sleep(0.5)
        assert client.events == ["refused"] and server.events == []
        assert str(client.refusals[0]) == reason

    run(test)


def test_a_refused_peer_comes_in_once_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(stream, "REFUSED_S", 0.1)
        server, client = End(hello("server")), End(hello("client"))
        answers = iter(["not yet", "not yet", None])
        async with serving(server, admit=lambda peer: next(answers)) as at, dialling(client, at.address):
            await client.until_event("open server")
        assert client.events == ["refused", "refused", "open server", "close server"]

    run(test)


@pytest.mark.parametrize(("major", "minor", "fits"), [(0, 0, True), (0, 1, True), (0, 2, False), (1, 0, False)])
def test_versions_one_minor_apart_work_and_others_are_refused(major: int, minor: int, fits: bool) -> None:
    """The dialling side is a raw gRPC client of another version: (major, minor) newer than ours."""

    async def test() -> None:
        server = End(hello("server"))
        mine = pb.Hello(
            major=stream.PROTOCOL_MAJOR + major,
            minor=stream.PROTOCOL_MINOR + minor,
            peer="raw",
            token=server.me.token,
        )
        async with serving(server) as at, grpc.aio.insecure_channel(at.address) as channel:
            call = channel.stream_stream("/mooncake.v1.Peer/Stream")()
            await call.write(pb.Envelope(hello=mine).SerializeToString())
            if fits:
                answer = pb.Envelope.FromString(await call.read()).hello
                assert (answer.peer, answer.token) == ("server", "")
                return
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert f"protocol {mine.major}.{mine.minor} of raw does not fit 1.0 of server" in str(
                refused.value.details()
            )

    run(test)


@pytest.mark.parametrize("first", [b"", b"\xff\xff", pb.Envelope(items=[pb.Item(drain="x")]).SerializeToString()])
def test_who_does_not_begin_with_a_hello_is_refused(first: bytes) -> None:
    async def test() -> None:
        server = End(hello("server"))
        async with serving(server) as at, grpc.aio.insecure_channel(at.address) as channel:
            call = channel.stream_stream("/mooncake.v1.Peer/Stream")()
            await call.write(first)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert server.events == []

    run(test)


def test_who_says_nothing_is_shown_out_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(stream, "HANDSHAKE_S", 0.2)
        server = End(hello("server"))
        async with serving(server) as at, grpc.aio.insecure_channel(at.address) as channel:
            call = channel.stream_stream("/mooncake.v1.Peer/Stream")()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    run(test)


def test_a_server_that_accepts_and_says_nothing_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(stream, "HANDSHAKE_S", 0.2)
        writers: list[asyncio.StreamWriter] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)

        mute = await asyncio.start_server(accept, "127.0.0.1", 0)
        client = End(hello("client"))
        async with dialling(client, f"127.0.0.1:{mute.sockets[0].getsockname()[1]}"):
            async with asyncio.timeout(5):
                while len(writers) < 2:
                    await asyncio.sleep(0.01)
        mute.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
        assert client.events == []

    run(test)


def test_of_two_peers_with_one_name_the_newer_wins_and_the_older_is_told() -> None:
    async def test() -> None:
        server, older, newer = End(hello("server")), End(hello("twin")), End(hello("twin"))
        async with serving(server) as at, dialling(older, at.address):
            await older.until_event("open server")
            async with dialling(newer, at.address):
                await older.until_event("refused")
                server.link.send(Drain("for the newer"))
                await newer.until_received(1)
                assert older.events == ["open server", "close server", "refused"]
                assert "replaced by a newer connection of the same name, twin" in str(older.refusals[0])
                assert isinstance(server.links[0].error, Refused) and server.links[1].error is None
                assert newer.events == ["open server"]

    run(test)


# ---------------------------------------------------------------- broken links


def test_a_broken_connection_is_seen_by_both_ends_and_made_anew() -> None:
    async def test() -> None:
        server, client = End(hello("server")), End(hello("client"))
        async with serving(server) as at:
            wire = Wire(at.address)
            async with wire.open() as address, dialling(client, address):
                await client.until_event("open server")
                wire.cut()
                await client.until_event("open server", 2)
                await server.until_event("close client")
                await server.until_event("open client", 2)
                client.link.send(Drain("again"))
                await server.until_received(1)
        assert client.events == ["open server", "close server"] * 2

    run(test)


def test_a_silent_wire_is_noticed_by_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BEAT_S", 0.05)
    monkeypatch.setattr(stream, "SILENCE_S", 0.3)

    async def test() -> None:
        server, client = End(hello("server")), End(hello("client"))
        async with serving(server) as at:
            wire = Wire(at.address)
            async with wire.open() as address, dialling(client, address):
                await asyncio.gather(client.until_event("open server"), server.until_event("open client"))
                wire.freeze()
                await asyncio.gather(client.until_event("close server"), server.until_event("close client"))
                for end in (client, server):
                    assert "nothing was heard from it for 0.3 s" in str(end.link.error)

    run(test)


def test_an_end_that_did_not_run_does_not_blame_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends live in this loop, so what stops one stops the other; each finds its own clock far ahead."""
    monkeypatch.setattr(stream, "BEAT_S", 0.05)
    monkeypatch.setattr(stream, "SILENCE_S", 0.3)

    async def test() -> None:
        async with pair() as (server, client):
            await asyncio.sleep(0.12)
            time.sleep(0.6)  # noqa: ASYNC251
            client.link.send(Drain("still here"))
            await server.until_received(1)
            await asyncio.sleep(0.2)
            assert (client.events, server.events) == (["open server"], ["open client"])

    run(test)


def test_an_idle_link_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the silence that would end it; empty envelopes reach nobody's handler."""
    monkeypatch.setattr(stream, "BEAT_S", 0.05)
    monkeypatch.setattr(stream, "SILENCE_S", 0.3)

    async def test() -> None:
        async with pair() as (server, client):
            await asyncio.sleep(1)
            assert server.envelopes == client.envelopes == []
            client.link.send(Drain("still here"))
            await server.until_received(1)
            assert client.events == ["open server"]

    run(test)


def test_a_server_that_comes_late_or_comes_back_is_found() -> None:
    async def test() -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{reserved.getsockname()[1]}"
        server, client = End(hello("server")), End(hello("client"))
        async with dialling(client, address):
            await asyncio.sleep(0.2)
            async with serving(server, address):
                await client.until_event("open server")
            await client.until_event("close server")
            async with serving(server, address):
                await client.until_event("open server", 2)
        assert server.events == ["open client", "close client"] * 2

    run(test)


def test_an_outbox_that_overflows_closes_the_link_and_a_new_one_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with pair() as (server, client):
            monkeypatch.setattr(stream, "OUTBOX_MESSAGES", 5)
            for end, other in ((client, server), (server, client)):
                link = end.link
                for message in drains(6):
                    link.send(message)
                assert link.closed and isinstance(link.error, OutboxFull)
                assert str(link.error) == f"{other.me.peer} does not read: 5 messages wait"
                link.send(Drain("to nobody"))
                await end.until(lambda end, link=link: end.link is not link)  # type: ignore[misc]
            assert client.events[:3] == ["open server", "close server", "open server"]
            assert server.inbox == client.inbox == []

    run(test)


def test_a_message_that_cannot_be_sent_closes_the_link_rather_than_muting_it() -> None:
    async def test() -> None:
        async with pair() as (server, client):
            first = client.link
            first.send(Drain(5))  # type: ignore[arg-type]
            await client.until_event("open server", 2)
            assert isinstance(first.error, ProtocolFault)
            client.link.send(Drain("next"))
            await server.until_received(1)
            assert server.inbox == [Drain("next")]

    run(test)


@pytest.mark.parametrize("broken", ["client", "server"])
def test_a_failing_callback_ends_its_link_loudly_and_a_new_one_follows(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with pair() as (server, client):
            far, near = (server, client) if broken == "client" else (client, server)
            near.fail_next = ZeroDivisionError("a bug")
            far.link.send(Drain("lost with its link"))
            await asyncio.gather(client.until_event("close server"), server.until_event("close client"))
            await asyncio.gather(client.until_event("open server", 2), server.until_event("open client", 2))
            far.link.send(Drain("again"))
            await near.until_received(1)
            assert near.inbox == [Drain("again")]

    run(test)
    assert any("a callback failed" in record.message for record in caplog.records)


def test_wrong_bytes_close_the_link_and_the_peer_is_told_why() -> None:
    async def test() -> None:
        server = End(hello("server"))
        async with serving(server) as at, grpc.aio.insecure_channel(at.address) as channel:
            call = channel.stream_stream("/mooncake.v1.Peer/Stream")()
            mine = pb.Hello(major=stream.PROTOCOL_MAJOR, minor=stream.PROTOCOL_MINOR, peer="raw", token=server.me.token)
            await call.write(pb.Envelope(hello=mine).SerializeToString())
            await call.read()
            await call.write(b"\xff")
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await call.read()
            assert ended.value.code() is grpc.StatusCode.ABORTED and "invalid message" in str(ended.value.details())
        assert server.events == ["open raw", "close raw"]

    run(test)


def test_a_link_that_breaks_at_once_every_time_is_not_dialled_in_a_tight_loop() -> None:
    async def test() -> None:
        server, client = End(hello("server")), End(hello("client"))
        async with serving(server, on_open=lambda link: link.close()) as at, dialling(client, at.address):
            await asyncio.sleep(1.5)
        assert 3 <= client.events.count("open server") <= 9

    run(test)


# ---------------------------------------------------------------- starting and ending


@pytest.mark.parametrize("state", ["open", "refused", "nobody there", "mute"])
def test_closing_is_prompt_in_every_state(state: str) -> None:
    async def test() -> None:
        server, client = End(hello("server")), End(hello("client"))
        mute = socket.create_server(("127.0.0.1", 0))
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(mute.close)
            address = f"127.0.0.1:{mute.getsockname()[1]}"
            if state in ("open", "refused"):
                why = "no" if state == "refused" else None
                address = (await stack.enter_async_context(serving(server, admit=lambda peer: why))).address
            if state == "nobody there":
                mute.close()
            dialler = await stack.enter_async_context(dialling(client, address))
            await asyncio.sleep(0.3)
            began = time.monotonic()
            await dialler.close()
            assert time.monotonic() - began < 0.5
            assert client.events == {"open": ["open server", "close server"], "refused": ["refused"]}.get(state, [])

    run(test)


def test_a_server_that_closes_ends_all_links_first() -> None:
    async def test() -> None:
        server, ends = End(hello("server")), [End(hello(f"client-{number}")) for number in range(3)]
        async with serving(server) as at, contextlib.AsyncExitStack() as stack:
            for end in ends:
                await stack.enter_async_context(dialling(end, at.address))
                await end.until_event("open server")
            began = time.monotonic()
            await at.close()
            assert time.monotonic() - began < 0.5
            assert sorted(server.events[3:]) == [f"close client-{number}" for number in range(3)]

    run(test)


def test_a_port_in_use_is_named() -> None:
    async def test() -> None:
        first, second = End(hello("first")), End(hello("second"))
        async with serving(first) as at:
            assert int(at.address.rpartition(":")[2]) > 0
            with pytest.raises(ConfigError, match=f"cannot listen at {at.address}"):
                async with serving(second, at.address):
                    pass

    run(test)


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subject = ["-subj", "/CN=mooncake", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    try:
        subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return TlsConfig(cert=str(cert), key=str(key), ca=str(cert))


def test_tls_needs_the_certificate_on_both_sides(tls: TlsConfig) -> None:
    async def test() -> None:
        async with pair(tls=tls) as (server, client):
            client.link.send(Registered(True))
            await server.until_received(1)
        server, stranger = End(hello("server")), End(hello("stranger"))
        async with serving(server, tls=tls) as at, dialling(stranger, at.address):
            await asyncio.sleep(0.3)
        assert server.events == stranger.events == []

    run(test)


@pytest.mark.parametrize(
    "wrong",
    [TlsConfig(cert="/no/cert", key="/no/key"), TlsConfig(ca="/no/ca"), TlsConfig(cert="/no/cert")],
)
def test_wrong_tls_files_stop_the_start_of_both_sides(wrong: TlsConfig) -> None:
    async def test() -> None:
        with pytest.raises(ConfigError, match="tls"):
            async with serving(End(hello("server")), tls=wrong):
                pass
        with pytest.raises(ConfigError, match="tls"):
            async with dialling(End(hello("client")), "127.0.0.1:1", tls=wrong):
                pass

    run(test)


logging.getLogger("grpc").setLevel(logging.ERROR)
