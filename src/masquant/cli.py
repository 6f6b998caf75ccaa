# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls the API, prints. Results on stdout, progress on stderr, mistakes in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console

from .errors import DataError, MasquantError, RecipeError
from .progress import AbstractProgress, NoProgress, RichProgress
from .version import __version__

if TYPE_CHECKING:  # for annotations: importing torch takes seconds, which --help need not
    from .modality import Modality
    from .recipe import EncoderScheme, Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Multimodal LLMs in 4 to 8 bits that still see, hear and read.",
)


class Effort(str, Enum):
    """How much time a recipe takes, for the help text."""

    DEFAULT = "default"
    FAST = "fast"
    REFINED = "refined"


class CacheName(str, Enum):
    """Kinds of KV cache, for the help text."""

    FLOAT = "float"
    INT8 = "int8"


class SchemeName(str, Enum):
    """Schemes, for the help text."""

    W8A8 = "W8A8"
    W4A8 = "W4A8"
    W4A6 = "W4A6"
    W4A16 = "W4A16"


ModelArgument = Annotated[
    str, typer.Argument(help="Model folder or hub id that transformers loads.", show_default=False)
]
OutArgument = Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)]
SchemeOption = Annotated[SchemeName, typer.Option(help="Bits of weights and activations.", case_sensitive=False)]
PresetOption = Annotated[
    Effort,
    typer.Option(help="fast: no candidates compared, no gradients; refined: rounding refined block by block (slow)."),
]
GroupOption = Annotated[
    str | None, typer.Option(help="Inputs per weight scale: 32, 64, 128 or channel.", show_default="128, or 64 or 32")
]
MethodOption = Annotated[
    str,
    typer.Option(help="Recipe by name: masquant, masquant-paper, quarot, gptq, svdquant, mbq, awq, smoothquant, rtn."),
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe file (YAML) instead of scheme, group size, method.")
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Linears that stay in floating point, besides the recipe's: a name such as layers.0.mlp.down_proj, or "
        '"re:" and a regular expression; repeatable.'
    ),
]
HeadOption = Annotated[bool, typer.Option("--quantize-lm-head", help="Give embeddings and head 8-bit rows.")]
EncodersOption = Annotated[
    bool,
    typer.Option("--quantize-encoders", help="Give the linears of encoders 8-bit rows: vision W8A8, audio W8A16."),
]
CacheOption = Annotated[
    CacheName,
    typer.Option(
        help="Keys and values of past tokens: as the model has them, or in 8 bits. int8 decodes by transformers' "
        "generate, not in masquant's kernels."
    ),
]
CalibrationOption = Annotated[
    Path,
    typer.Option(
        "--calibration", help="Folder with metadata.jsonl: text, image and audio samples.", show_default=False
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="Use only this many samples, balanced over tasks.", min=1)]
BatchOption = Annotated[int, typer.Option(help="Samples that run together.", min=1)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
JsonFileOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
ReportOption = Annotated[Path | None, typer.Option("--report", help="Also write a page to this .html file.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        help="GiB that the process may take; hidden states beyond it go to disk.",
        min=0.1,
        show_default="80 % of what is free",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Load the model as auto (its own), bfloat16, float16 or float32.")]


def _progress(quiet: bool) -> AbstractProgress:
    return NoProgress() if quiet else RichProgress()


def _group_size(value: str | None) -> int | Literal["channel"] | None:
    if value is None or value == "channel":
        return cast(Literal["channel"] | None, value)
    if value not in ("32", "64", "128"):
        raise RecipeError(f"--group-size must be 32, 64, 128 or channel, got {value!r}")
    return int(value)


def _device(name: str) -> str:
    import torch

    from .distributed import join

    number = join()
    return (f"cuda:{number}" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _bytes(size: float) -> str:
    from .evaluation import human_bytes

    return human_bytes(size)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    calibration: CalibrationOption,
    scheme: SchemeOption = SchemeName.W4A8,
    group_size: GroupOption = None,
    method: MethodOption = "masquant",
    preset: PresetOption = Effort.DEFAULT,
    recipe: RecipeOption = None,
    ignore: IgnoreOption = None,
    quantize_lm_head: HeadOption = False,
    quantize_encoders: EncodersOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = 8,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    memory: MemoryOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize MODEL into a packed checkpoint.

    Example: `masquant quantize Qwen/Qwen2.5-Omni-3B -o omni-w4a8 --scheme W4A8 --calibration data/calibration`

    Several GPUs or processes share the samples: `torchrun --nproc-per-node 2 -m masquant.cli quantize ...`
    """
    from .api import estimate_folder, quantize_folder
    from .calibration.dataset import load_samples
    from .description import describe_plan
    from .presentation import show_description, show_estimate

    encoders = _encoders_of(model) if quantize_encoders else {}
    chosen = _recipe(method, scheme, group_size, preset, recipe, ignore, quantize_lm_head, encoders)
    samples = load_samples(calibration, limit=limit)
    run: dict[str, Any] = {
        "batch_size": batch_size,
        "device": _device(device),
        "dtype": dtype,
        "memory": None if memory is None else int(memory * 2**30),
        "progress": _progress(quiet),
    }
    if dry_run:
        found = describe_plan(model, chosen)
        estimate = estimate_folder(model, samples, chosen, **run)
        if as_json:
            _print_json({**found.to_dict(), "estimate": estimate.to_dict()})
        else:
            show_description(found)
            show_estimate(estimate)
        return
    try:
        report = quantize_folder(model, output, samples, chosen, **run, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command with --resume goes on from the last finished block", err=True)
        raise typer.Exit(1) from None
    if as_json:
        _print_json({"output": str(output), **report.to_dict()})
        return
    size = sum(report.bytes[k] for k in ("packed", "smooth_scale", "compensation"))
    typer.echo(
        f"{output}: decoder linears {_bytes(report.bytes['float_before'])} -> {_bytes(size)} "
        f"({chosen.scheme.name}, {chosen.method}) in {report.seconds:.0f} s, peak memory {_bytes(report.peak_memory)}"
    )


def _recipe(
    method: str,
    scheme: SchemeName,
    group_size: str | None,
    preset: Effort,
    file: Path | None,
    ignore: list[str] | None,
    quantize_lm_head: bool,
    encoders: Mapping[Modality, EncoderScheme],
) -> Recipe:
    """The recipe of a file or of its flags, with what other flags add."""
    from .recipe import Recipe

    chosen = Recipe.from_yaml(file) if file else Recipe.preset(method, scheme.value, _group_size(group_size))
    return dataclasses.replace(
        chosen.with_effort(preset.value),
        ignore=(*chosen.ignore, *(ignore or ())),
        quantize_lm_head=chosen.quantize_lm_head or quantize_lm_head,
        encoders=encoders or chosen.encoders,
    )


def _encoders_of(model: str) -> dict[Modality, EncoderScheme]:
    """What `--quantize-encoders` does to a model's encoders."""
    from .integrations.loading import read_config
    from .models import family_of
    from .plan import default_encoders

    return default_encoders(family_of(read_config(model)))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, or checkpoint folder.", show_default=False)],
    calibration: Annotated[Path | None, typer.Option(help="Samples whose activation ranges are shown.")] = None,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="With --calibration: what quantizing will take of time, memory and disk."),
    ] = False,
    scheme: SchemeOption = SchemeName.W4A8,
    group_size: GroupOption = None,
    method: MethodOption = "masquant",
    preset: PresetOption = Effort.DEFAULT,
    recipe: RecipeOption = None,
    ignore: IgnoreOption = None,
    quantize_lm_head: HeadOption = False,
    quantize_encoders: EncodersOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = 8,
    memory: MemoryOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file; -: print it instead of tables.")
    ] = None,
    report: ReportOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show what would be quantized, or what a quantized checkpoint holds. The model is left as it is.

    Example: `masquant inspect Qwen/Qwen2.5-Omni-3B --calibration data/calibration --report ranges.html`
    """
    from .api import estimate_folder
    from .calibration.dataset import load_samples
    from .checking import is_checkpoint
    from .checkpoint.store import write_json
    from .description import describe_checkpoint, describe_plan
    from .inspection import activation_ranges
    from .presentation import show_description, show_estimate, show_ranges
    from .report import check_target, ranges_content, write_report

    if calibration is None and (report is not None or estimate):
        option = "--report shows activation ranges" if report is not None else "--estimate tries a run"
        raise DataError(f"{option}, which needs samples: give --calibration too")
    if report is not None:
        check_target(report)
    finished = is_checkpoint(model)
    if finished and calibration is not None:
        raise DataError(f"{model} is quantized; activation ranges and estimates are of the float model")
    encoders = _encoders_of(model) if quantize_encoders else {}
    chosen = _recipe(method, scheme, group_size, preset, recipe, ignore, quantize_lm_head, encoders)
    found = describe_checkpoint(model) if finished else describe_plan(model, chosen)
    result = found.to_dict()
    console = json_file != Path("-")
    if console:
        show_description(found)
    if calibration is not None:
        progress = _progress(quiet)
        rows = activation_ranges(model, calibration, limit=limit, batch_size=batch_size, progress=progress)
        result["ranges"] = rows
        if report is not None:
            write_report(report, ranges_content(Path(model).name if Path(model).is_dir() else model, rows))
        if console:
            show_ranges(rows)
        if estimate:
            samples = load_samples(calibration, limit=limit)
            bound = None if memory is None else int(memory * 2**30)
            taken = estimate_folder(model, samples, chosen, batch_size=batch_size, memory=bound, progress=progress)
            result["estimate"] = taken.to_dict()
            if console:
                show_estimate(taken)
    if json_file is not None and console:
        write_json(json_file, result)
    elif json_file is not None:
        _print_json(result)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or any model.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder with metadata.jsonl.", show_default=False)],
    baseline: Annotated[str | None, typer.Option(help="Float model to compare with, sample by sample.")] = None,
    json_file: JsonFileOption = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    limit: LimitOption = None,
    batch_size: BatchOption = 16,
    generate: Annotated[bool, typer.Option(help="Decode answers for error rates and exact match.")] = True,
    kv_cache: CacheOption = CacheName.FLOAT,
    quiet: QuietOption = False,
) -> None:
    """Measure what is left per task: likelihood, perplexity, error rates, exact match; against a baseline, the loss.

    Example: `masquant evaluate omni-w4a8 --data data/evaluation --baseline Qwen/Qwen2.5-Omni-3B --json result.json`
    """
    from .api import load_processor
    from .calibration.dataset import load_samples
    from .checkpoint.store import write_json
    from .compare import describe
    from .evaluation import evaluate as run
    from .evaluation import evaluation_table
    from .inspection import scheme_of
    from .integrations.loading import load_any

    samples = load_samples(data, limit=limit)
    loaded = load_any(model)
    float_model = load_any(baseline) if baseline else None
    parameters = (float_model or loaded).num_parameters()
    scheme = scheme_of(loaded) + (", int8 KV cache" if kv_cache is CacheName.INT8 else "")
    result = run(
        loaded,
        load_processor(model),
        samples,
        baseline=float_model,
        tasks=tasks.split(",") if tasks else None,
        batch_size=batch_size,
        generate=generate,
        progress=_progress(quiet),
        description=describe(loaded, model, scheme, parameters),
        kv_cache=kv_cache.value,
    )
    if json_file:
        write_json(json_file, result.to_dict(samples=True))
    Console().print(evaluation_table({scheme: result}))


@app.command()
def compare(
    model: ModelArgument,
    calibration: CalibrationOption,
    data: Annotated[Path, typer.Option(help="Folder with metadata.jsonl to measure on.", show_default=False)],
    methods: Annotated[str, typer.Option(help="Recipes, separated by commas.")] = "rtn,smoothquant,gptq,masquant",
    scheme: SchemeOption = SchemeName.W4A8,
    group_size: GroupOption = None,
    limit: LimitOption = None,
    preset: PresetOption = Effort.DEFAULT,
    quantize_encoders: EncodersOption = False,
    batch_size: BatchOption = 16,
    generate: Annotated[bool, typer.Option(help="Decode answers for error rates and exact match.")] = True,
    json_file: JsonFileOption = None,
    report: ReportOption = None,
    quiet: QuietOption = False,
) -> None:
    """Quantize with several methods and show what each loses per task.

    Example: `masquant compare MODEL --methods rtn,gptq,masquant --calibration cal --data eval --report page.html`
    """
    from .calibration.dataset import load_samples
    from .checkpoint.store import write_json
    from .compare import compare as run
    from .evaluation import comparison_dict, evaluation_table
    from .report import check_target, comparison_content, embed_examples, write_report

    if report is not None:
        check_target(report)
        if json_file is not None and json_file.resolve() == report.with_suffix(".json").resolve():
            raise DataError(f"{json_file} is where the page's own numbers go; give --json another name")
    samples = load_samples(data, limit=limit)
    records: dict[str, Any] = {}
    results = run(
        model,
        methods.split(","),
        load_samples(calibration, limit=limit),
        samples,
        scheme=scheme.value,
        group_size=_group_size(group_size),
        batch_size=batch_size,
        generate=generate,
        effort=preset.value,
        encoders=_encoders_of(model) if quantize_encoders else None,
        progress=_progress(quiet),
        keep=lambda method, _model, _processor, record, _result: records.update({method: record.to_dict()}),
    )
    if json_file:
        write_json(json_file, comparison_dict(results, samples=True))
    if report is not None:
        content = comparison_content(records, results, samples)
        write_report(report, content, embed_examples(content, samples))
    Console().print(evaluation_table(results))


@app.command()
def report(
    out: OutArgument,
    result: Annotated[
        Path | None, typer.Option(help="What `evaluate --json` or `compare --json` wrote, for loss and examples.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that it was measured on, for the examples' pictures and sounds.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .html file.", show_default="OUT/report.html")
    ] = None,
) -> None:
    """Write one page about a finished run: bytes, loss, activation ranges, errors, ranks, examples, recipe.

    Example: `masquant report omni-w4a8 --result result.json --data data/evaluation`
    """
    from .calibration.dataset import load_samples
    from .report import read_results, report_run

    if result is not None and data is None:
        raise DataError("--result needs --data too, the folder that it was measured on")
    results = read_results(result) if result is not None else None
    samples = load_samples(data) if data is not None else []
    typer.echo(report_run(out, results=results, samples=samples, output=output))


@app.command()
def check(out: OutArgument, as_json: JsonOption = False) -> None:
    """Is the checkpoint whole, loadable, and is nothing silently in floating point?

    Example: `masquant check omni-w4a8`
    """
    from .api import check as run

    found = run(out)
    if as_json:
        _print_json(found)
    else:
        encoders = f" and {found['encoder_linears']} in encoders" if found["encoder_linears"] else ""
        typer.echo(f"{out}: whole; {found['scheme']}, {found['quantized_linears']} quantized linears{encoders}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or any model.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="Picture for the first message; repeatable.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="Sound for the first message; repeatable.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and end.")] = None,
    system: Annotated[str | None, typer.Option(help="What the system message says.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0: the likeliest tokens.", min=0, max=2, show_default="the model's own")
    ] = None,
    kv_cache: CacheOption = CacheName.FLOAT,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: print JSON.")] = False,
) -> None:
    """Talk to a model in the terminal: text, pictures and sounds; /help lists the commands.

    Example: `masquant chat omni-w4a8 --image cat.jpg --prompt "What is shown in the picture?"`
    """
    from .api import load_processor
    from .chat import Chat, attachment, tokens_per_second, typed_lines
    from .conversation import Responder, Sampling
    from .inspection import scheme_of
    from .integrations.loading import load_any

    if as_json and prompt is None:
        raise typer.BadParameter("--json needs --prompt")
    attached = [attachment("image", str(f)) for f in image or ()] + [attachment("audio", str(f)) for f in audio or ()]
    loaded = load_any(model, dtype=dtype).to(_device(device))
    responder = Responder(loaded, load_processor(model), kv_cache=kv_cache.value)
    console = Console(quiet=as_json, force_terminal=False if prompt is not None else None)
    conversation = Chat(
        responder, console, system=system, sampling=Sampling(max_new_tokens, temperature), attached=attached
    )
    if prompt is None:
        typer.echo(f"{scheme_of(responder.model)}, {responder.decoding}; /help lists the commands", err=True)
        conversation.run(typed_lines())
        typer.echo(conversation.summary(), err=True)
        return
    answer = conversation.say(prompt)
    if as_json:
        from .measuring import peak_memory

        _print_json(
            {
                "answer": conversation.messages[-1].parts[0].content if len(conversation.messages) > 1 else "",
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "first_token_seconds": answer.first_token_seconds,
                "tokens_per_second": tokens_per_second([answer]),
                "model_bytes": conversation.memory,
                "peak_memory": peak_memory(),
            }
        )
    if answer.finish_reason == "cancelled":
        raise typer.Exit(1)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or any model.", show_default=False)],
    baseline: Annotated[str | None, typer.Option(help="Float model, served beside it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send.", envvar="MASQUANT_API_KEY", show_default="none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 1024,
    max_context: Annotated[int, typer.Option(help="Tokens of a conversation and its answer.", min=1)] = 8192,
    max_requests: Annotated[int, typer.Option(help="Requests that run or wait; more get 429.", min=1)] = 16,
    max_megabytes: Annotated[int, typer.Option(help="Size of a request.", min=1)] = 20,
    max_megapixels: Annotated[int, typer.Option(help="Pictures of a conversation together.", min=1)] = 32,
    max_audio_seconds: Annotated[int, typer.Option(help="Sounds of a conversation together.", min=1)] = 120,
    grace: Annotated[int, typer.Option(help="Seconds that answers may go on after SIGTERM.", min=0)] = 30,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Serve a model: OpenAI's chat completions at /v1, and a page at / to show it pictures and sounds.

    Example: `masquant serve omni-w4a8 --baseline Qwen/Qwen2.5-Omni-3B`
    """
    from .serving import Limits, serve

    serve(
        model,
        baseline,
        host=host,
        port=port,
        api_key=api_key,
        limits=Limits(
            requests=max_requests,
            request_bytes=max_megabytes * 2**20,
            new_tokens=max_new_tokens,
            context_tokens=max_context,
            pixels=max_megapixels * 10**6,
            audio_seconds=max_audio_seconds,
        ),
        grace_seconds=grace,
        device=_device(device),
        dtype=dtype,
        note=lambda text: typer.echo(text, err=True),
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the checkpoint is left.")] = Path(
        "omni-135m-w4a8"
    ),
    scheme: SchemeOption = SchemeName.W4A8,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples, likelihoods only.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    json_file: JsonFileOption = None,
    quiet: QuietOption = False,
) -> None:
    """No model at hand: assemble a small text + image + audio model, quantize it with four methods, compare.

    Example: `masquant demo`
    """
    from .showcase import run_demo

    run_demo(output, scheme.value, quick=quick, overwrite=overwrite, json_file=json_file, progress=_progress(quiet))


@app.command()
def families(as_json: JsonOption = False) -> None:
    """The model families that are supported, as a Markdown table.

    Example: `masquant families`
    """
    from .models.table import family_rows, family_table

    if as_json:
        _print_json(family_rows())
    else:
        typer.echo(family_table())


def main() -> None:
    """Entry point: 0 done, 1 refused or failed, 2 wrong usage."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        app(standalone_mode=True)
    except MasquantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
