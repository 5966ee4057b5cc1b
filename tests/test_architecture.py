"""Imports point one way, the light parts import no torch, and the code uses the project's words."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saddlepoint"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each module or folder may import those before it, and a folder's files one another. To add one, put it as high as it can
# stand. `campaign` is the only one that talks to targets for an attack, so nothing that it calls may know it.
LAYERS = [
    "__init__",  # the version
    "errors",
    "types",
    "tool_text",  # tools and their calls as the text that a model reads and writes
    "artifacts",
    "registry",
    "composition",
    "models",  # where weights come from
    "sandbox",  # where agents act
    "policies",
    "targets",
    "attacks",
    "saliency",
    "judges",
    "metrics",
    "power_law",  # how an attack grows with its shots
    "diversity",  # reported beside rates
    "store",
    "approvals",  # answers that wait for a person
    "defenses",
    "training",
    "rewards",  # what an answer is worth
    "reward_watch",
    "reinforcement",
    "recipes",
    "campaign",
    "config",
    "loop",
    "reward_runs",
    "report",
    "exchange",  # runs in the formats of others
    "audit",
    "organism",
    "clerk",
    "guard",
    "attacker",
    "finetuning",  # a user's own examples: checked, trained on, and what it did to safety
    "service",  # any target behind its defenses, and fine-tuning, over HTTP
    "bench",
    "claims",  # published findings, re-tested
    "testing",  # what outside packages test with
    "cli",
    "__main__",
]
# A method is its own file and nothing else: it knows the records and how to register, not what calls it.
ONLY = {
    "__init__": set(),
    "errors": set(),
    "types": set(),
    "artifacts": {"errors", "types"},
    "registry": {"artifacts", "errors", "types"},
    "attacks": {"errors", "types", "registry"},
    # A loss is of what is trained; some attack it as it learns, some learn by reward.
    "recipes": {"errors", "types", "registry", "attacks", "targets", "training", "rewards", "reinforcement"},
    "metrics": {"types"},
    "power_law": {"metrics"},
    "store": {"errors", "types"},
}
WEIGHTS = {"torch", "transformers", "peft", "safetensors", "tokenizers", "accelerate", "huggingface_hub", "gguf"}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports anywhere, functions and type checking too: `saddlepoint.store`, `torch.nn`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "write imports in full, from the package down"
            yield from (f"{node.module}.{alias.name}" if node.module == "saddlepoint" else str(node.module) for alias in node.names)


def ours(path: Path) -> set[str]:
    """The other layers that a file imports."""
    found = {name.split(".")[1] for name in imported(ast.parse(path.read_text())) if name.startswith("saddlepoint.")}
    return {"__init__" if name == "__version__" else name for name in found} - {layer(path)}


def at_import(path: Path) -> set[str]:
    """The top packages that a file imports when it is imported itself."""
    body = [
        node for node in ast.parse(path.read_text()).body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return {
        name.partition(".")[0]
        for node in body
        for name in imported(node)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_its_layer() -> None:
    assert set(LAYERS) == {layer(path) for path in FILES}
    assert len(LAYERS) == len(set(LAYERS))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_one_way(path: Path) -> None:
    allowed = ONLY.get(layer(path), set(LAYERS[: LAYERS.index(layer(path))]))
    assert set() == ours(path) - allowed, f"{module(path)} may import only {', '.join(sorted(allowed)) or 'nothing of ours'}"


def test_the_rule_would_find_an_import_that_points_back(tmp_path: Path) -> None:
    assert {"campaign", "store"} == {
        name.split(".")[1]
        for name in imported(ast.parse("from saddlepoint import campaign\ndef f():\n    import saddlepoint.store"))
        if "." in name
    }
    with pytest.raises(AssertionError):
        list(imported(ast.parse("from . import campaign")))


# ---- weights only where they are needed


def needs_weights(path: Path) -> bool:
    return 'access="white-box"' in path.read_text() or module(path) in {
        "saddlepoint.targets.hf",
        "saddlepoint.targets._tree",
        "saddlepoint.targets._decoding",
        "saddlepoint.targets._lora",
        "saddlepoint.targets._prefix",
        "saddlepoint.targets._reading",
        "saddlepoint.targets._shaping",
        "saddlepoint.targets._plain",
        "saddlepoint.targets.classifier",
        "saddlepoint.attacks._gradient",
        "saddlepoint.defenses.generation._activations",
        "saddlepoint.defenses.generation._decode",
        "saddlepoint.defenses.generation.rain",
        "saddlepoint.defenses.generation.refusal_steering",
        "saddlepoint.defenses.generation.safe_decoding",
        "saddlepoint.defenses._adaptive",
        "saddlepoint.attacker",
        "saddlepoint.guard",
        "saddlepoint.saliency",
        "saddlepoint.bench._nanogcg",
        "saddlepoint.bench._trl",
        "saddlepoint.training",
        "saddlepoint.reinforcement",
        "saddlepoint.finetuning.reinforce",
        "saddlepoint.recipes.rbrm_rl",
        "saddlepoint.finetuning.first_token",
        "saddlepoint.finetuning.drift",
        "saddlepoint.finetuning.mixing",
        "saddlepoint.finetuning.checkpoints",
        "saddlepoint.finetuning.masks",
        "saddlepoint.finetuning.fused",
        "saddlepoint.finetuning.packed",
        "saddlepoint.finetuning.head",
        "saddlepoint.finetuning.learner",
        "saddlepoint.finetuning.objectives",
        "saddlepoint.finetuning.train",
        "saddlepoint.recipes.dpo",
        "saddlepoint.recipes.jain_ascent",
        "saddlepoint.recipes.circuit_breakers",
        "saddlepoint.recipes._adversarial",
        "saddlepoint.recipes.embedding_adversarial",
        "saddlepoint.recipes.latent_adversarial",
        "saddlepoint.recipes.discrete_adversarial",
        "saddlepoint.organism",
        "saddlepoint.clerk",
    }


@pytest.mark.parametrize("path", [path for path in FILES if not needs_weights(path)], ids=module)
def test_only_what_needs_weights_imports_torch(path: Path) -> None:
    assert set() == at_import(path) & WEIGHTS


def light(*names: str) -> str:
    """What is loaded of the libraries for weights once these modules are imported."""
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names!r}]; print(*sorted(set(sys.modules) & {WEIGHTS!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_the_command_line_starts_without_torch() -> None:
    assert "" == light("saddlepoint.cli")


def test_everything_that_needs_no_weights_is_imported_without_torch() -> None:
    assert "" == light(*(module(path) for path in FILES if not needs_weights(path) and path.name != "__main__.py"))


# ---- the project's words

# DESIGN, section 6: one word per thing. What each of these is called here: target, behavior, attack, judge, judge.
WORDS = {"victim", "goal", "probe", "scorer", "detector"}
ALLOWED = {
    ("perplexity_filter", "scorer"),  # the model whose loss is the score; it judges nothing
    ("gcg", "probe_sampling"),  # what the paper and nanoGCG call it
    ("gcg", "probe"),
    ("jbb", "goal"),  # a field of its format
    ("goal_priority", "goal_priority"),  # the paper's name for it
    ("goal_priority", "GoalPriority"),
}


def public(tree: ast.AST) -> Iterator[str]:
    """Every public name that a file defines: functions, classes, parameters, attributes and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words(name: str) -> set[str]:
    """`GoalProbes_v2` -> {goal, probe, v}."""
    return {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_names_use_the_projects_words(path: Path) -> None:
    names = {name for name in (path.stem, *public(ast.parse(path.read_text()))) if not name.startswith("_")}
    assert [] == sorted(name for name in names if words(name) & WORDS and (path.stem, name) not in ALLOWED)


def test_the_rule_would_find_another_word() -> None:
    code = "class ToxicityDetector:\n    goals: int = 1\ndef run(victim_model):\n    self.probe = SCORERS = 2"
    assert ["SCORERS", "ToxicityDetector", "goals", "probe", "victim_model"] == sorted(
        n for n in public(ast.parse(code)) if words(n) & WORDS
    )
    assert not words("proble_problem goalie detect score") & WORDS
