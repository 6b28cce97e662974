"""The command line. Options are those of `mooncake.config.Config`; nothing is declared twice."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import msgspec

from mooncake import __version__
from mooncake.config import Config, RoleConfig, ServiceRole, load_config, options, read_launch, save_config
from mooncake.core.errors import ConfigError, EventLogError, MooncakeError, ReplayMismatch, TraceError
from mooncake.frontend.keys_text import TENANT_TEXTS
from mooncake.plan.options import flag, parse_options, texts
from mooncake.trace.options import TEXTS, parse_synth_options

_WATCH_S = 2.0
_CLEAR_SCREEN = "\x1b[H\x1b[2J"
_ROLE_HELP: dict[ServiceRole, str] = {
    "conductor": "run the global scheduler",
    "prefill": "run one prefill instance",
    "decode": "run one decode instance",
    "store": "run this machine's store node, or with --nodes a store of its own",
    "directory": "run the directory of a store of its own",
    "frontend": "run the HTTP frontend",
}


class _Parser(argparse.ArgumentParser):
    """One sentence instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except MooncakeError as error:
        from mooncake.cluster.child import EXIT_BAD_CONFIG, exit_code

        print(f"mooncake: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG if isinstance(error, TraceError) else exit_code(error)
    except BrokenPipeError:  # whoever reads this, such as head, has enough
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mooncake", description="Disaggregated, KVCache-centric LLM serving.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mooncake {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser("serve", help="run a whole cluster on this machine", allow_abbrev=False)
    serve.set_defaults(run=_serve)
    _add_options(serve)
    for role in get_args(ServiceRole):
        command = commands.add_parser(role, help=_ROLE_HELP[role], allow_abbrev=False)
        command.set_defaults(run=_run_role, role=role)
        _add_role_options(command)
        if role == "store":
            _add_store_options(command)
        _add_options(command)
    prepare = commands.add_parser(
        "prepare", help="fetch and convert the model of a configuration file", allow_abbrev=False
    )
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("--config", metavar="FILE", required=True, help="rewritten with the place of the model")
    replay = commands.add_parser(
        "replay-log", help="tell cores again what their event logs say, and compare what they do", allow_abbrev=False
    )
    replay.set_defaults(run=_replay_log)
    replay.add_argument(
        "files", metavar="FILE", nargs="+", help="an event log, as written to the folder of --event-log"
    )
    explain = commands.add_parser(
        "explain", help="why requests were placed where they were, or refused", allow_abbrev=False
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("what", metavar="FILE|ID", help="the Conductor's event log; or a request's x-request-id")
    _add_frontend_options(explain)
    explain.add_argument(
        "--request", metavar="FRONTEND/NUMBER", default="", help="only this one, such as frontend-0/12"
    )
    explain.add_argument("--last", metavar="N", type=_positive, default=10, help="placements from the end; 10")
    _add_key_commands(commands)
    _add_operator_commands(commands)
    _add_trace_commands(commands)
    _add_plan_commands(commands)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """One flag per option; values stay text, the declaration checks them."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with any of these; flags and MOONCAKE_* override it"
    )
    groups: dict[str, Any] = {}
    for option in options().values():
        if option.secret:  # everybody on the machine sees the flags of a process
            continue
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(option.section)
        help_text = option.help.replace("%", "%%")
        metavar = option.path[-1].upper()
        groups[option.section].add_argument(
            option.flag, dest=option.key, metavar=metavar, help=help_text, default=argparse.SUPPRESS
        )


def _add_role_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("this process; addresses are unix:/path or host:port, by default in run_dir")
    group.add_argument("--name", help="unique in the cluster")
    group.add_argument("--listen", metavar="ADDRESS", help="where it serves; a frontend uses --host and --port")
    group.add_argument("--conductor", metavar="ADDRESS", help="where the Conductor is")
    group.add_argument("--node", metavar="NAME", help="this machine's store node")
    group.add_argument("--metrics", metavar="HOST:PORT", help="answer GET /metrics and /health there")
    group.add_argument("--store", metavar="ADDRESS", help="data port of that node: unix:/path or tcp://host:port")


def _add_store_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a store of its own, without a Conductor")
    group.add_argument("--directory", metavar="ADDRESS", help="report to this directory, and to no Conductor")
    group.add_argument("--nodes", metavar="N", type=_positive, help="run a directory and so many nodes on this machine")


def _add_key_commands(commands: Any) -> None:
    keys = commands.add_parser("keys", help="API keys and limits of tenants, in the key file", allow_abbrev=False)
    kinds = keys.add_subparsers(metavar="COMMAND", required=True)
    add = kinds.add_parser("add", help="make a key, and its tenant if it is new; print the key", allow_abbrev=False)
    shown = kinds.add_parser("list", help="keys and tenants", allow_abbrev=False)
    revoke = kinds.add_parser("revoke", help="refuse a key from now on", allow_abbrev=False)
    limit = kinds.add_parser("limit", help="change what a tenant may use", allow_abbrev=False)
    for command, run in ((add, _keys_add), (shown, _keys_list), (revoke, _keys_revoke), (limit, _keys_limit)):
        command.set_defaults(run=run)
        command.add_argument("--config", metavar="FILE", help="configuration file that may name the key file")
        command.add_argument("--api-keys", dest="api_keys", metavar="FILE", help="key file", default=argparse.SUPPRESS)
    for command in (add, limit):
        command.add_argument("--tenant", metavar="NAME", required=True)
        for name, text in TENANT_TEXTS.items():
            command.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=text)
    add.add_argument("--expires", metavar="TIME", help="such as 12h, 30d, or 2027-01-31; never if not given")
    add.add_argument("--admin", action="store_true", help="may read metrics, and name the tenant of a request")
    shown.add_argument("--json", action="store_true", help="print JSON, without hashes, instead of tables")
    revoke.add_argument("key", metavar="ID", help="as `keys list` shows it, or the key itself")


def _add_frontend_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--url", help="of a frontend, such as http://127.0.0.1:8000")
    which.add_argument("--run-dir", metavar="FOLDER", help="of a cluster that runs on this machine")


def _add_operator_commands(commands: Any) -> None:
    status = commands.add_parser("status", help="a running cluster: instances, queue, objectives", allow_abbrev=False)
    status.set_defaults(run=_status)
    status.add_argument("--watch", action="store_true", help="again every 2 s, until Ctrl-C")
    status.add_argument("--json", action="store_true", help="print JSON, one line each time, instead of tables")
    drain = commands.add_parser("drain", help="let an instance take nothing new", allow_abbrev=False)
    drain.set_defaults(run=_drain)
    drain.add_argument("--wait", action="store_true", help="until it has nothing left")
    drain.add_argument("--timeout", metavar="SECONDS", type=_positive, help="of --wait; 600")
    undrain = commands.add_parser("undrain", help="let it take requests again", allow_abbrev=False)
    undrain.set_defaults(run=_undrain)
    for command in (drain, undrain):
        command.add_argument("instance", metavar="INSTANCE", help="such as decode-0")
    for command in (status, drain, undrain):
        _add_frontend_options(command)


def _add_trace_commands(commands: Any) -> None:
    trace = commands.add_parser("trace", help="what a trace is like, or one like it", allow_abbrev=False)
    kinds = trace.add_subparsers(metavar="COMMAND", required=True)
    stats = kinds.add_parser("stats", help="counts, lengths, rates, bursts, reuse, hit rates", allow_abbrev=False)
    rates = kinds.add_parser("hit-rate", help="hit rates of one cache by capacity and policy", allow_abbrev=False)
    synth = kinds.add_parser("synth", help="write a synthetic trace, like FILE or from parameters", allow_abbrev=False)
    for command, run in ((stats, _trace_stats), (rates, _trace_hit_rate), (synth, _trace_synth)):
        command.set_defaults(run=run)
        command.add_argument("file", metavar="FILE", nargs="?" if command is synth else None, help="may be gzipped")
        command.add_argument("--format", help="mooncake, bailian, azure or burstgpt; detected if not given")
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    rates.add_argument("--capacity", metavar="LIST", help="such as 1000,30k,1.5M")
    rates.add_argument("--unit", choices=("blocks", "tokens"), default="blocks", help="of the capacity; blocks")
    rates.add_argument("--policy", metavar="LIST", help="lru,lfu,fifo,s3fifo,learned,belady; all if not given")
    synth.add_argument("--out", metavar="FILE", required=True, help="replaced if there; gzipped if it ends with .gz")
    for name, text in TEXTS.items():
        synth.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=text, default=argparse.SUPPRESS)


def _add_plan_commands(commands: Any) -> None:
    replay = commands.add_parser("replay", help="run a trace through a simulated cluster", allow_abbrev=False)
    replay.set_defaults(run=_replay)
    replay.add_argument("trace", metavar="TRACE", help="Mooncake, Bailian, Azure or BurstGPT; may be gzipped")
    replay.add_argument("--format", help="of the trace; detected if not given")
    replay.add_argument("--out", metavar="FOLDER", help="write summary.json, requests.jsonl and report.html there")
    replay.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for name, text in texts().items():
        replay.add_argument(flag(name), dest=name, metavar=name.upper(), help=text, default=argparse.SUPPRESS)
    paper = commands.add_parser("reproduce", help="a paper's figures, published beside simulated", allow_abbrev=False)
    paper.set_defaults(run=_reproduce)
    paper.add_argument("paper", choices=("fast25",), help="the Mooncake paper of FAST'25")
    paper.add_argument("--trace-dir", metavar="FOLDER", default=".", help="where the traces of its release are; .")
    paper.add_argument("--only", metavar="LIST", help="such as fig5,fig15; all if not given")
    paper.add_argument("--quick", action="store_true", help="the beginning of each trace only")
    paper.add_argument("--json", metavar="FILE", help="write all rows there")


def _load(arguments: argparse.Namespace) -> Config:
    values = vars(arguments)
    return load_config(values["config"], {key: value for key, value in values.items() if key in options()})


def _serve(arguments: argparse.Namespace) -> int:
    from mooncake.cluster.local import serve
    from mooncake.cluster.screen import Screen

    return serve(_load(arguments), Screen())


def _run_role(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "nodes", None):
        return _serve_stores(arguments)
    from mooncake.cluster.child import run_service, start_child
    from mooncake.cluster.local import refuse_foreign_package
    from mooncake.cluster.run_dir import make_private

    launch = read_launch()
    config = _load(arguments)
    status = start_child(launch, config.log_level)
    if launch.supervisor_pid is None:
        refuse_foreign_package()
        make_private(Path(config.run_dir))
    if not config.token:
        raise ConfigError(
            "token: not set; processes of one cluster share one (MOONCAKE_TOKEN or the configuration file)"
        )
    return run_service(config, _role_config(config, arguments), status)


def _serve_stores(arguments: argparse.Namespace) -> int:
    from mooncake.cluster.screen import Screen
    from mooncake.cluster.stores import NODES_MAX, serve_stores

    if arguments.nodes > NODES_MAX:
        raise ConfigError(f"--nodes {arguments.nodes}: a machine has up to {NODES_MAX}")
    return serve_stores(_load(arguments), arguments.nodes, Screen())


def _role_config(config: Config, arguments: argparse.Namespace) -> RoleConfig:
    """Addresses as given, the others as on one machine."""
    from mooncake.cluster.local import NODE, local_role

    role = cast(ServiceRole, arguments.role)
    node = arguments.node or (arguments.name if role == "store" and arguments.name else NODE)
    default_name = {"conductor": "conductor", "store": node, "directory": "directory"}.get(role, f"{role}-0")
    found = local_role(config, role, arguments.name or default_name, node)
    if getattr(arguments, "directory", None):
        found = msgspec.structs.replace(found, conductor="", directory=arguments.directory)
    given = {
        key: getattr(arguments, key) for key in ("listen", "conductor", "store", "metrics") if getattr(arguments, key)
    }
    return msgspec.structs.replace(found, **given)


def _prepare(arguments: argparse.Namespace) -> int:
    from mooncake.cluster.child import run_reporting, start_child

    config = load_config(arguments.config)
    status = start_child(read_launch(), config.log_level)

    def prepare() -> None:
        from mooncake.engine.models import resolve_model

        model = resolve_model(config.model, report=status.loading)
        named = msgspec.structs.replace(config, model=str(model.path), model_name=config.model_name or model.name)
        save_config(named, Path(arguments.config))
        status.ready(str(model.path))

    return run_reporting("model", prepare, status)


def _replay_log(arguments: argparse.Namespace) -> int:
    """0: all cores do as they did; 1: one does not; 2: a file is no event log."""
    from mooncake.sim.replay_log import replay_log

    code = 0
    for file in arguments.files:
        try:
            replayed = replay_log(Path(file))
        except ReplayMismatch as error:
            print(error)
            code = max(code, 1)
        except EventLogError as error:
            print(f"mooncake: {error}", file=sys.stderr)
            code = 2
        else:
            held = ", ".join(f"{what}: {count}" for what, count in replayed.leftovers().items())
            outcome = f"{replayed.num_events} events gave the same commands"
            print(f"{file}: {replayed.kind}: {outcome}; still held: {held or 'nothing'}")
    return code


def _explain(arguments: argparse.Namespace) -> int:
    """A file is an event log; all else is asked of the frontend."""
    if Path(arguments.what).exists() and arguments.url is None and arguments.run_dir is None:
        return _explain_log(arguments)
    from mooncake.cluster.operate import NoAnswer, find_frontend

    try:
        print(find_frontend(arguments.url, arguments.run_dir).explain(arguments.what))
    except NoAnswer as error:
        raise NoAnswer(f"{arguments.what}: is no file, and {error}") from None
    return 0


def _explain_log(arguments: argparse.Namespace) -> int:
    """As `_replay_log`; 1 also if there is no such placement."""
    from mooncake.sim.replay_log import explain_log

    try:
        records = explain_log(Path(arguments.what), arguments.request, arguments.last)
    except ReplayMismatch as error:
        print(error)
        return 1
    except EventLogError as error:
        print(f"mooncake: {error}", file=sys.stderr)
        return 2
    wanted = f" of {arguments.request}" if arguments.request else ""
    print("\n\n".join(records) or f"{arguments.what}: no placement{wanted}")
    return 0 if records else 1


def _key_file(arguments: argparse.Namespace) -> Path:
    file = _load(arguments).api_keys
    if file is None:
        raise ConfigError("api_keys: not set; name the key file by --api-keys FILE")
    return Path(file)


def _keys_add(arguments: argparse.Namespace) -> int:
    from mooncake.frontend import keys, keys_text

    changes = keys_text.parse_changes(vars(arguments))
    now_s = int(time.time())
    expires = keys_text.parse_expiry(arguments.expires, now_s)
    print(keys.add_key(_key_file(arguments), arguments.tenant, changes, now_s, expires, admin=arguments.admin))
    print("This key is shown once: the file has only its hash.", file=sys.stderr)
    return 0


def _keys_list(arguments: argparse.Namespace) -> int:
    from mooncake.frontend import keys, keys_text

    now_s = time.time()
    return _show(keys_text.listing(keys.read_keys(_key_file(arguments)), now_s), keys_text.listing_text, arguments)


def _keys_revoke(arguments: argparse.Namespace) -> int:
    from mooncake.frontend import keys

    revoked = keys.revoke_key(_key_file(arguments), arguments.key, int(time.time()))
    print(f"key {revoked.id} of tenant {revoked.tenant} is revoked")
    return 0


def _keys_limit(arguments: argparse.Namespace) -> int:
    from mooncake.frontend import keys, keys_text

    changed = keys.change_tenant(_key_file(arguments), arguments.tenant, keys_text.parse_changes(vars(arguments)))
    print(f"tenant {arguments.tenant}: {keys_text.tenant_text(changed)}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from mooncake.cluster.operate import find_frontend
    from mooncake.cluster.status_text import status_text

    frontend = find_frontend(arguments.url, arguments.run_dir)
    clear = _CLEAR_SCREEN if arguments.watch and not arguments.json and sys.stdout.isatty() else ""

    def show() -> None:
        status = frontend.status()
        print(clear + (msgspec.json.encode(status).decode() if arguments.json else status_text(status)), flush=True)

    show()
    while arguments.watch:
        time.sleep(_WATCH_S)
        try:
            show()
        except MooncakeError as error:  # it may come back
            print(f"mooncake: {error}", file=sys.stderr, flush=True)
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    """1: not drained in time."""
    from mooncake.cluster.operate import WAIT_S, find_frontend, wait_drained

    frontend = find_frontend(arguments.url, arguments.run_dir)
    print(frontend.hold(arguments.instance, True), flush=True)
    if not arguments.wait:
        return 0
    drained = wait_drained(
        frontend, arguments.instance, arguments.timeout or WAIT_S, lambda text: print(text, flush=True)
    )
    return 0 if drained else 1


def _undrain(arguments: argparse.Namespace) -> int:
    from mooncake.cluster.operate import find_frontend

    print(find_frontend(arguments.url, arguments.run_dir).hold(arguments.instance, False))
    return 0


def _trace_stats(arguments: argparse.Namespace) -> int:
    from mooncake.plan import trace_report, trace_tables

    return _show(trace_report.stats_report(arguments.file, arguments.format), trace_tables.stats_text, arguments)


def _trace_hit_rate(arguments: argparse.Namespace) -> int:
    from mooncake.plan import trace_report, trace_tables

    what = arguments.capacity, arguments.unit, arguments.policy
    report = trace_report.hit_rate_report(arguments.file, arguments.format, *what)
    return _show(report, trace_tables.hit_rate_text, arguments)


def _trace_synth(arguments: argparse.Namespace) -> int:
    from mooncake.plan import trace_report, trace_tables

    wanted = parse_synth_options({name: value for name, value in vars(arguments).items() if name in TEXTS})
    report = trace_report.synth_report(arguments.file, arguments.format, arguments.out, wanted)
    return _show(report, trace_tables.synth_text, arguments)


def _show(report: Any, text: Callable[[Any], str], arguments: argparse.Namespace) -> int:
    shown = msgspec.json.format(msgspec.json.encode(report)).decode() if arguments.json else text(report)
    print(shown, flush=True)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from mooncake.plan import replay, replay_page, replay_text

    wanted = parse_options({name: value for name, value in vars(arguments).items() if name in texts()})
    replay.target(wanted)
    trace = replay.check(arguments.trace, arguments.format, wanted.limit)
    progress = replay_text.ProgressLine(sys.stderr, trace.num_requests, trace.span_ns / 1e9 / wanted.speed)
    with replay.lines_file(arguments.out) as lines:
        write = lines.write if lines is not None else None
        done = replay.replay_trace(trace, wanted, write=write, on_progress=progress.show)
    progress.clear()
    if arguments.out is not None:
        replay.write_report(arguments.out, done.report, replay_page.render(done.replay, done.report))
    return _show(done.report, replay_text.report_text, arguments)


def _reproduce(arguments: argparse.Namespace) -> int:
    from mooncake.plan import fast25

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = fast25.reproduce(arguments.trace_dir, arguments.only, quick=arguments.quick, say=say)
    if arguments.json is not None:
        fast25.write_json(arguments.json, found.rows)
    print(fast25.reproduction_text(found), flush=True)
    return 0
