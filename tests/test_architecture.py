"""The shape of the code: imports go downward, models are named in their own folder only, the surface is one page."""

import ast
import re
from pathlib import Path

import masquant

PACKAGE = Path(masquant.__file__).parent

# From the bottom up; a module may import its own layer and those below.
LAYERS = (
    {"errors", "version", "progress", "rotation", "distributed"},
    {"measuring"},
    {"strict", "modality"},
    {"recipe"},
    {"rotation_learning"},
    {"models", "quantization"},
    {"blocks", "cache"},
    {"compensation", "smoothing", "plan", "calibration"},
    {"runtime"},
    {"checkpoint", "solver", "allocation"},
    {"integrations", "block", "refinement", "spending"},
    {"original", "generation"},
    {"run"},
    {"pipeline"},
    {"card", "checking", "contents", "estimate"},
    {"api", "evaluation"},
    {"compare", "demo", "report"},
    {"inspection", "description", "showcase", "conversation", "recording"},
    {"chat", "serving", "presentation"},
    {"cli", "__init__"},
)


def layer_of(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def imports_of(file: Path) -> set[str]:
    """Top-level parts of masquant that a file imports."""
    depth = len(file.relative_to(PACKAGE).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_go_downward() -> None:
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imports_of(file):
            assert layer_of(other) <= layer_of(own), f"{file.relative_to(PACKAGE)} imports {other}"


def test_no_model_is_named_outside_of_models() -> None:
    names = re.compile(
        r"qwen|llava|gemma|smolvlm|idefics|internvl|mistral|phi4|phi-4|voxtral|whisper|siglip", re.IGNORECASE
    )
    allowed = {"models", "demo.py", "cli.py"}  # cli: hub ids in examples; demo: names of its packages
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] not in allowed:
            assert not names.search(file.read_text()), file


def test_no_star_imports_prints_or_stubs() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert "import *" not in text, file
        assert "NotImplementedError" not in text and "TODO" not in text, file
        if file.name != "cli.py":
            assert not re.search(r"(?<![\w.])print\(", text), file


def test_public_names_exist() -> None:
    assert all(hasattr(masquant, name) for name in masquant.__all__)
