"""`disttrain k8s`: manifests to apply, and what is wrong with those that were changed by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from disttrain.launcher.kubernetes import KINDS


@click.group(short_help="Kubernetes: render manifests, and look for faults in them.")
def k8s() -> None:
    """Manifests for Kubernetes: rendered from a few options, or checked where you have written them yourself."""


@k8s.command(context_settings={"show_default": True})
@click.option("--kind", type=click.Choice(KINDS), required=True, help="See above.")
@click.option("--name", default="disttrain", help="Of the job.")
@click.option("--workers", type=int, default=2, help="Pods that train.")
@click.option("--gpus", type=int, default=0, help="On each worker; a rank takes one.")
@click.option("--slots", type=int, help="Ranks on each worker; default: one for each GPU, else one.")
@click.option("--elastic", type=int, help="Go on with as few workers as this (mpijob).")
@click.option("--image", default="disttrain:0.1", help="Made from k8s/Dockerfile.")
@click.option("--namespace", help="Default: the one that kubectl uses.")
@click.option("--queue", help="Of Kueue; with --volcano, of Volcano.")
@click.option("--volcano", is_flag=True, help="Have Volcano start all pods or none (mpijob, trainjob).")
@click.option("--claim", default="checkpoints", help="The volume claim that is mounted at /checkpoints.")
@click.option("--storage", default="10Gi", help="Size of that claim (pvc).")
@click.option("--cpus", help="Each worker's request; default: 2 for each rank, 4 for each GPU.")
@click.option("--memory", help="Each worker's; default: 4Gi for each rank, 16Gi for each GPU.")
@click.option("--hours", type=int, default=24, help="After which the job is ended.")
@click.option("--restarts", type=int, default=3, help="How often a job that failed starts again.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="For the ranks; may be repeated.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; default: the terminal.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def render(out: Path | None, **options: Any) -> None:
    """Writes a manifest, with the reasons for what is in it.

    \b
    mpijob       MPI Operator: a launcher starts ranks over ssh; Horovod or MPI
    trainjob     Kubeflow Trainer: the same, as TrainingRuntime and TrainJob
    indexed-job  no operator: a Job and a Service; TensorFlow's own collectives
    jobset       JobSet: the same, and all ranks start again together
    pvc          the claim for checkpoints

    COMMAND (after --) is what every rank runs; default: disttrain train digits. `python` and `disttrain` are the image's."""
    from disttrain.errors import ConfigError
    from disttrain.launcher.kubernetes.render import Options
    from disttrain.launcher.kubernetes.render import render as rendered

    text = rendered(Options(**options))
    if not out:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None


@k8s.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
def lint(files: tuple[str, ...]) -> None:
    """Looks for faults in manifests: fields that are unknown or of the wrong type, and what Kubernetes accepts although the
    job would hang, fail, run on one node or keep its GPUs.

    `-` reads what is piped in: kubectl kustomize DIR | disttrain k8s lint -

    Each fault is a line, file:line: where: what; what to do [rule]. Exit code 1 if there is one."""
    from disttrain.launcher.kubernetes import lint as linter

    faults = [
        fault
        for file in files
        for fault in (linter.lint_text(sys.stdin.read(), "<stdin>") if file == "-" else linter.lint(file))
    ]
    for fault in faults:
        click.echo(str(fault))
    said = f"{len(faults)} fault{'s' * (len(faults) != 1)} in {len(files)} file{'s' * (len(files) != 1)}"
    click.echo(said, err=True)
    sys.exit(1 if faults else 0)
