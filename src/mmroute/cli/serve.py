"""`mmroute serve`: the gateway; `mmroute replay`: another policy over its log."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["replay", "serve"]


def serve(
    draft: Annotated[str, typer.Option(help="URL#model of an OpenAI-compatible server, or a local model.")] = "",
    target: Annotated[str, typer.Option(help="The same, of the large model.")] = "",
    budget: Annotated[float | None, typer.Option(help="Share of queries for the target, 0 to 1.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "",
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; see docs/serving.md.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Setting, e.g. limits.images=4; repeatable.")] = None,
) -> None:
    """Serve a draft and a target as one OpenAI-compatible model, with a page to look at it."""
    from mmroute.config import overrides
    from mmroute.gate._manifest import MANIFEST, WEIGHTS
    from mmroute.serve import settings as settings_

    given: dict[str, Any] = {}
    for role, text in (("draft", draft), ("target", target)):
        if text:
            given[role] = settings_.upstream(text)
    if budget is not None:
        given["policy"] = {"name": "budget", "budget": budget}
    given |= {"host": host} if host else {}
    given |= {"port": port} if port is not None else {}
    given |= {"insecure": True} if insecure else {}
    for name, value in overrides(set_ or []).items():
        before = given.get(name)
        given[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value

    def read() -> settings_.Settings:
        return settings_.read(config, given)

    settings = read()
    from mmroute.serve.run import serve as run  # what is wrong in the settings is said before torch is imported

    if settings.draft.url is None and settings.draft.model == settings.target.model:
        typer.echo(
            f"draft and target are the same model {settings.draft.model!r}, the draft routed by the recipe "
            f"{settings.draft.recipe!r}: the target is not larger, and nothing is trained to rate; give --draft and "
            "--target for a pair that differs",
            err=True,
        )
    watched = [path for path in (config, settings.api_keys_file) if path is not None]
    if settings.rater is not None:  # of a folder; what is bundled or on the Hub does not change under a running gateway
        watched += [Path(settings.rater) / name for name in (MANIFEST, WEIGHTS)]
    run(settings, read, watched)


def replay(
    file: Annotated[Path, typer.Argument(help="A replay log of the gateway.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Policy option, e.g. name=budget budget=0.3; repeatable.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Share of queries for the target, 0 to 1.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Run another policy over the ratings of a replay log: what it would have done, on real traffic."""
    from mmroute.config import overrides
    from mmroute.errors import ConfigError
    from mmroute.gate._policy import policy
    from mmroute.serve.replay import read_log
    from mmroute.serve.replay import replay as run

    options = overrides(set_ or [])
    if budget is not None:
        options = {"name": "budget", **options, "budget": budget}
    if "name" not in options:
        raise ConfigError("replay: which policy? --budget 0.3, or --set name=threshold --set threshold=0.1")
    found = run(read_log(file), policy(**options))
    if json_:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for name, value in found.items():
        typer.echo(f"{name:20} {'-' if value is None else f'{value:.4g}'}")
