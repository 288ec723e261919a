"""A family's server: its target with or without its exported draft, as `specflow serve` and the stages start it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from specflow.config import Family, Serve, SglangSpeculation
from specflow.errors import UserError
from specflow.files import read_json, write_text
from specflow.paths import Paths, outside
from specflow.serving.engines import EngineName, Install, Launch, find_install, launch
from specflow.serving.server import Server, check_port, free_port, running
from specflow.targets.model import TargetFacts, read_facts, server_template

logger = logging.getLogger("specflow")
CPU_CONTEXT = 4096
"""Context where none is asked for on a machine without a GPU: a long one needs more cache than its share of memory."""


def launch_for(
    family: Family,
    name: str,
    paths: Paths,
    *,
    engine: EngineName,
    port: int,
    draft: bool | None,
    num_speculative_tokens: int | None = None,
    install: Install | None = None,
) -> Launch:
    """The command of a server of family `name`; the draft is held against its load contract first.

    `draft` None: as recommended, see `drafting`.
    """
    facts = read_facts(paths.target)
    draft, k, tree = drafting(family, engine, draft, num_speculative_tokens)
    serve = family.serve
    install = install or find_install(engine, serve, paths.cache)
    if install.on_cpu and serve.max_model_len is None:
        serve = serve.model_copy(update={"max_model_len": min(CPU_CONTEXT, facts.max_position_embeddings)})
    serve = serve.model_copy(update={"extra_args": [*_target_args(facts, paths), *serve.extra_args]})
    folder = paths.export / "eagle3"
    if draft:
        # by name: what a server without a draft answers does not depend on how drafts are exported
        importlib.import_module("specflow.export.eagle3").check_export(folder, facts)
        serve = _within_drafts_context(serve, folder, facts)
    return launch(
        install,
        serve,
        target=facts.path(paths.cache).resolve(),
        target_dtype=facts.dtype,
        served_name=serve.model_name or name,
        port=port,
        draft=folder.resolve() if draft else None,
        num_speculative_tokens=k,
        tree=tree,
    )


def _within_drafts_context(serve: Serve, folder: Path, facts: TargetFacts) -> Serve:
    """A draft that was made for fewer positions than the target has limits the server's context, unless it is told."""
    config = read_json(folder / "config.json", what="export config", made_by="specflow export <family>")
    longest, asked = config["max_position_embeddings"], serve.max_model_len or facts.max_position_embeddings
    if longest >= asked:
        return serve
    short = f"the draft was made for {longest} positions, the target for {facts.max_position_embeddings}"
    if serve.max_model_len is not None:
        logger.warning("%s: beyond them serve.max_model_len %d drafts badly", short, serve.max_model_len)
        return serve
    logger.warning("%s: the server takes %d; serve.max_model_len sets another number", short, longest)
    return serve.model_copy(update={"max_model_len": longest})


def drafting(
    family: Family, engine: EngineName, draft: bool | None, num_speculative_tokens: int | None
) -> tuple[bool, int, SglangSpeculation | None]:
    """Whether a server drafts, how many tokens as a chain, and as which tree (SGLang).

    What was asked for goes before `serve.speculative`, and that before `export.num_speculative_tokens`.
    """
    tuned = family.serve.speculative
    k = num_speculative_tokens or family.export.num_speculative_tokens
    if tuned is None or num_speculative_tokens is not None:
        return draft is not False, k, None
    tree = tuned.sglang if engine == "sglang" else None
    pays = tuned.num_speculative_tokens > 0 or tree is not None
    return pays if draft is None else draft, tuned.num_speculative_tokens or k, tree


def _target_args(facts: TargetFacts, paths: Paths) -> list[str]:
    words = []
    if facts.template_date is not None:  # the engine's own rendering would ask for today's date
        file = paths.state / "servers" / "chat_template.jinja"
        write_text(file, server_template(facts, paths.cache))
        words += ["--chat-template", str(file.resolve())]
    elif facts.chat_template is not None:
        words += ["--chat-template", str(outside(facts.chat_template).resolve())]
    if facts.trust_remote_code:
        words.append("--trust-remote-code")
    return words


@contextlib.contextmanager
def child_server(
    family: Family,
    name: str,
    paths: Paths,
    *,
    engine: EngineName,
    draft: bool | None,
    num_speculative_tokens: int | None = None,
    log_name: str = "server",
    edit: Callable[[Launch], Launch] = lambda launch: launch,
    port: int | None = None,
) -> Iterator[Server]:
    """A server of our own for the length of the block; its output is kept under the family's state folder.

    `edit` changes the command before it runs: a capture adds its connector.
    """
    if port is not None:
        check_port(port)
    chosen = port or free_port()
    started = edit(launch_for(family, name, paths, engine=engine, port=chosen, draft=draft,
                              num_speculative_tokens=num_speculative_tokens))  # fmt: skip
    log = paths.servers / f"{log_name}.log"
    model = family.serve.model_name or name
    with running(started, port=chosen, model=model, log=log, start_timeout_s=family.serve.start_timeout_s) as server:
        yield server


def serve_until_stopped(
    family: Family,
    name: str,
    paths: Paths,
    *,
    engine: EngineName,
    port: int,
    draft: bool | None,
    num_speculative_tokens: int | None,
    say: Callable[[str], None],
) -> None:
    """`specflow serve`: print the command that does the same elsewhere, serve, and stop on Ctrl-C."""
    if family.serve.url is not None:
        raise UserError(f"families.{name}.serve.url is set: that server is somebody else's to start")
    drafts = drafting(family, engine, draft, num_speculative_tokens)[0]
    if draft is None and not drafts:
        say("without the draft, as serve.speculative recommends; --draft or -k drafts all the same")
    say(
        str(
            launch_for(
                family,
                name,
                paths,
                engine=engine,
                port=port,
                draft=draft,
                num_speculative_tokens=num_speculative_tokens,
            )
        )
    )
    if drafts and find_install(engine, family.serve, paths.cache).draws_wrongly:
        say("ask it at temperature 0: above, this build for CPU draws wrongly where it verifies drafts")
    with child_server(
        family,
        name,
        paths,
        engine=engine,
        draft=draft,
        num_speculative_tokens=num_speculative_tokens,
        log_name="serve",
        port=port,
    ) as server:
        say(f"serving {server.endpoint.model!r} at {server.endpoint.url}/v1, output in {server.log}; Ctrl-C stops it")
        while True:
            with contextlib.suppress(Exception):
                server.process.wait(1.0)
            server.check()
