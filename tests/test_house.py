"""The rules of the house, read off the source: what may import what, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"kernels": ROOT / "kernels", "passes": ROOT / "passes", "qcompile": ROOT / "qcompile"}
#: What a floor may import, besides itself and the world outside.
BELOW = {"kernels": set(), "passes": {"kernels"}, "qcompile": {"passes", "kernels"}}

SOURCES = sorted(path for folder in FLOORS.values() for path in folder.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]
TRACKED_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".metal", ".md", ".toml", ".html", ".css", ".js", ".cfg", ".yml", ""}

#: Files with a good reason to be longer than the limit; none so far.
LONG: set[str] = set()
LIMIT = 400

MODELS = (
    "llama", "bert", "gpt2", "gpt_neox", "gptj", "qwen", "mistral", "mixtral", "gemma", "phi3", "falcon", "bloom",
    "smollm", "whisper", "deepseek", "olmo", "cohere", "mamba", "t5", "vit", "resnet", "efficientnet", "minilm",
)  # fmt: skip


def _module(path: Path) -> str:
    """The dotted name a file imports as: ``passes/pack.py`` is ``qcompile.passes.pack``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "qcompile" else ("qcompile", *parts))


def _floor(module: str) -> str:
    second = module.split(".")[1] if "." in module else ""
    return second if second in ("kernels", "passes") else "qcompile"


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


MODULES = {_module(path): path for path in SOURCES}


def _imports(path: Path, everywhere: bool) -> set[str]:
    """The project's modules that a file imports: anywhere in it, or only when it is itself imported."""
    found: set[str] = set()
    nodes = list(ast.walk(_tree(path))) if everywhere else list(_at_import(_tree(path)))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {_known(alias.name) for alias in node.names if alias.name.split(".")[0] == "qcompile"}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno}: imports are absolute here")
            if node.module and node.module.split(".")[0] == "qcompile":
                found |= {_known(f"{node.module}.{alias.name}") for alias in node.names}
    return found - {_module(path)}


def _at_import(node: ast.AST) -> list[ast.AST]:
    """The nodes that run when the module is imported: not function bodies, not what only type checkers see."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        found += [child, *_at_import(child)]
    return found


def _known(name: str) -> str:
    """The longest prefix that is a module: ``from x import y`` may name a module or something in one."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def test_there_is_a_house() -> None:
    assert len(MODULES) > 20 and {_floor(module) for module in MODULES} == set(FLOORS)
    assert _module(ROOT / "passes" / "__init__.py") == "qcompile.passes"
    # The guards below see what they look for.
    assert "qcompile.kernels.scheme" in _imports(FLOORS["kernels"] / "qtensor.py", everywhere=True)
    assert _known("qcompile.kernels.scheme.Scheme") == "qcompile.kernels.scheme"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_arrows_point_down(path: Path) -> None:
    floor = _floor(_module(path))
    above = {name for name in _imports(path, everywhere=True) if _floor(name) not in BELOW[floor] | {floor}}
    assert not above, f"{floor} may import {sorted(BELOW[floor]) or 'nothing'} of the other floors"


def test_no_import_cycle() -> None:
    graph = {module: _imports(path, everywhere=False) for module, path in MODULES.items()}
    for module, path in MODULES.items():
        # Importing a.b runs a/__init__ first, but that it re-exports b is no cycle that anyone can run into.
        if path.name == "__init__.py":
            graph[module] = {name for name in graph[module] if not name.startswith(f"{module}.")}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            pytest.fail(" -> ".join([*trail[trail.index(module) :], module]))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, [*trail, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    assert done == set(MODULES)


@pytest.mark.parametrize("path", [p for p in SOURCES if _floor(_module(p)) != "qcompile"],
                         ids=[i for i in IDS if not i.startswith("qcompile")])  # fmt: skip
def test_no_architecture_is_named_below_the_front(path: Path) -> None:
    text = path.read_text(encoding="utf-8").lower()
    named = re.findall(rf"(?<![a-z])({'|'.join(MODELS)})(?![a-z])", text)
    assert not named, "passes and kernels know graphs, not models"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_no_assert_no_unpickling_no_evaluation(path: Path) -> None:
    wrong = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Assert):
            wrong.append(f"line {node.lineno}: assert; raise ValueError or TypeError with a message")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        wrong += [
            f"line {node.lineno}: imports {name}"  # type: ignore[attr-defined]
            for name in names
            if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
        ]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "os.system", "builtins.eval", "builtins.exec"):
                wrong.append(f"line {node.lineno}: {called}()")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"line {node.lineno}: torch.load without weights_only=True")
            if called.startswith("subprocess.") and keywords.get("shell") == "True":
                wrong.append(f"line {node.lineno}: a shell")
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_one_purpose_a_file(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < LIMIT or str(path.relative_to(ROOT)) in LONG, f"{lines} lines: split it, or say why not"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_modules_and_public_names_are_documented(path: Path) -> None:
    tree = _tree(path)
    if not tree.body:
        return
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "overload" for d in node.decorator_list):
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [node.name]
    assert not missing


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        return []
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_machine_is_named_in_what_is_committed() -> None:
    """No home folder, temporary folder or private address of anyone's machine."""
    place = re.compile(
        r"/(?:home|Users|root|work|mnt|opt)/[\w.-]+/"  # somebody's folders
        r"|https?://(?:10|127|172\.(?:1[6-9]|2\d|3[01])|192\.168)\.\d"
        r"|https?://[\w.-]*\.(?:internal|local|lan|corp)\b"
        r"|\blocalhost:\d"
    )
    wrong = []
    for path in _tracked():
        if path.suffix in TRACKED_SUFFIXES and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if place.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert place.search("see /home/me/x") and not place.search("passes/algorithms/gptq.py")
    assert not wrong


def _fresh(code: str, **environment: str) -> str:
    """What a fresh Python prints; run outside the checkout, so that the installed package is what it finds."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_does_nothing_but_register() -> None:
    """No heavy import, no Inductor hook, no compiler, no process, no file written, no global torch setting changed."""
    printed = _fresh(
        """
import sys, subprocess, torch
started = []
subprocess.Popen = lambda *a, **k: started.append(a) or (_ for _ in ()).throw(RuntimeError("a process was started"))
written = []
sys.addaudithook(lambda event, args: written.append(args[0])
                 if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
                 and not str(args[0]).endswith((".pyc",)) and "__pycache__" not in str(args[0]) else None)
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path))
of_torch = set(sys.modules)
import qcompile
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path)) == before
heavy = {"transformers", "torch._inductor.compile_fx", "tqdm", "psutil", "matplotlib", "triton"}
print(sorted(heavy & (set(sys.modules) - of_torch)), started, written)
"""
    )
    assert printed == "[] [] []"


def test_importing_leaves_the_compiler_as_it_was() -> None:
    printed = _fresh(
        """
import torch._inductor.config as c, torch._inductor.lowering as l
slots = [n for n in c.get_config_copy() if "custom" in n and "pass" in n]
before = {n: getattr(c, n) for n in slots}, len(l.lowerings)
import qcompile
print(len(slots), ({n: getattr(c, n) for n in slots}, len(l.lowerings)) == before)
"""
    )
    count, same = printed.split()
    assert int(count) >= 2 and same == "True"


def test_importing_needs_no_compiler() -> None:
    printed = _fresh("import qcompile, torch; print(hasattr(torch.ops.qcompile, 'linear'))", PATH="", CC="", CXX="")
    assert printed == "True"
