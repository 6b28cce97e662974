"""The command line. Options are those of `mooncake.config.Config`; nothing is declared twice."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import msgspec

from mooncake import __version__
from mooncake.config import Config, RoleConfig, ServiceRole, load_config, options, read_launch, save_config
from mooncake.core.errors import ConfigError, MooncakeError

_ROLE_HELP: dict[ServiceRole, str] = {
    "conductor": "run the global scheduler",
    "prefill": "run one prefill instance",
    "decode": "run one decode instance",
    "store": "run this machine's store node",
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
        from mooncake.cluster.child import exit_code

        print(f"mooncake: {error}", file=sys.stderr)
        return exit_code(error)
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
        _add_options(command)
    prepare = commands.add_parser(
        "prepare", help="fetch and convert the model of a configuration file", allow_abbrev=False
    )
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("--config", metavar="FILE", required=True, help="rewritten with the place of the model")
    return parser


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
    group.add_argument("--store", metavar="ADDRESS", help="data port of that node: unix:/path or tcp://host:port")


def _load(arguments: argparse.Namespace) -> Config:
    values = vars(arguments)
    return load_config(values["config"], {key: value for key, value in values.items() if key in options()})


def _serve(arguments: argparse.Namespace) -> int:
    from mooncake.cluster.local import serve
    from mooncake.cluster.screen import Screen

    return serve(_load(arguments), Screen())


def _run_role(arguments: argparse.Namespace) -> int:
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


def _role_config(config: Config, arguments: argparse.Namespace) -> RoleConfig:
    """Addresses as given, the others as on one machine."""
    from mooncake.cluster.local import NODE, local_role

    role = cast(ServiceRole, arguments.role)
    node = arguments.node or (arguments.name if role == "store" and arguments.name else NODE)
    default_name = {"conductor": "conductor", "store": node}.get(role, f"{role}-0")
    found = local_role(config, role, arguments.name or default_name, node)
    given = {key: getattr(arguments, key) for key in ("listen", "conductor", "store") if getattr(arguments, key)}
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
