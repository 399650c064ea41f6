"""The plan of the house, checked: file sizes, directions of imports, pins with reasons, documents that are true."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm.plug import table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lm", "experiments", "configs", "kernels_pallas")
MAX_LINES = 400
PLUG_SOCKETS = (
    "lm.patterns",
    "lm.caches",
    "lm.ffn",
    "lm.ffn.moe.routers",
    "lm.heads",
    "lm.measures",
    "lm.mixers",
    "lm.norms",
    "lm.objectives",
    "lm.optimizers",
    "lm.optimizers.schedules",
    "lm.positions",
    "lm.positions.augmentation",
    "lm.positions.scaling",
    "lm.surgery",
)
# Plug names that are also plain words a description of any decoder may use.
GENERIC = {
    "attention",
    "causal",
    "constant",
    "default",
    "dynamic",
    "base",
    "full",
    "learned",
    "linear",
    "none",
    "partial",
    "softmax",
}


# What kernels may use of the library: it imports nothing of ours.
LEAVES = {"lm.compat", "lm.errors"}


def _sources(*packages: str) -> list[Path]:
    return sorted(p for name in packages for p in (ROOT / name).rglob("*.py"))


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module named by an import statement, also inside functions; relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)


def _graph() -> dict[str, set[str]]:
    files = {_module(p): p for p in _sources(*PACKAGES)}
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = set(_imports(ast.parse(path.read_text(encoding="utf-8")), package))
        graph[name] = {m for m in found if m in files and m != name}
    return graph


def _circle(graph: dict[str, set[str]]) -> list[str] | None:
    """One import circle, or None. Depth-first; iterative so that a long chain is no problem."""
    done: set[str] = set()
    for root in graph:
        path, stack = [root], [iter(sorted(graph[root]))]
        while stack and root not in done:
            for child in stack[-1]:
                if child in path:
                    return [*path[path.index(child) :], child]
                if child not in done:
                    path.append(child)
                    stack.append(iter(sorted(graph[child])))
                    break
            else:
                done.add(path.pop())
                stack.pop()
    return None


def _tracked() -> list[Path]:
    """Files git tracks or would track; everything but tool folders where this is no git checkout."""
    args = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        out = subprocess.run(args, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        skip = {".git", ".venv", "runs", "__pycache__"}
        return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]
    return [p for p in (ROOT / name for name in out.split("\0") if name) if p.is_file()]


def _texts() -> Iterator[tuple[Path, str]]:
    for path in _tracked():
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            yield path, data.decode("utf-8", errors="replace")


def test_files_are_short() -> None:
    sizes = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in _sources(*PACKAGES)}
    assert len(sizes) > 30
    assert {f: n for f, n in sizes.items() if n > MAX_LINES} == {}


def test_no_import_circle() -> None:
    graph = _graph()
    assert "lm.attention.masks" in graph["lm.attention.branches"]  # the scan sees edges at all
    assert _circle(graph) is None


def test_circle_finder() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_test_file_imports_another() -> None:
    """What two of them need is in tests/cases or in a helper beside them."""
    files = {path.stem: path for path in _sources("tests") if path.name.startswith("test_")}
    assert len(files) > 50
    known = {"test_lightning_gpu", "test_tree_decode_gpu", "test_block_table_gpu"}  # of kernels
    wrong = []
    for name, path in files.items():
        found = set(_imports(ast.parse(path.read_text(encoding="utf-8")), ""))
        wrong += [f"{name} imports {m}" for m in found if m.rpartition(".")[2] in files and name not in known]
    assert wrong == []


def test_library_does_not_import_its_users() -> None:
    wrong = [
        f"{name} imports {m}"
        for name, targets in _graph().items()
        for m in targets
        if (name.split(".")[0] in ("lm", "kernels_pallas") and m.split(".")[0] in ("experiments", "configs"))
        or (name.split(".")[0] == "kernels_pallas" and m.split(".")[0] == "lm" and m not in LEAVES)
    ]
    assert wrong == []
    assert {m: _graph()[m] for m in LEAVES} == {m: set() for m in LEAVES}


def test_sockets_do_not_import_each_others_plugs() -> None:
    """Within a socket plugs may build on each other; another socket's plug is reached through a config alone."""
    plugs = {cls.__module__ for socket in PLUG_SOCKETS for cls in table(socket).values()}
    folders = {socket.rsplit(".", 1)[0] if socket.count(".") > 1 else socket for socket in PLUG_SOCKETS}
    wrong = []
    for name, targets in _graph().items():
        folder = ".".join(name.split(".")[:2])
        if folder in folders:
            wrong += [f"{name} imports {m}" for m in targets & plugs if not m.startswith(folder)]
    assert wrong == []


def test_decoder_names_no_plug() -> None:
    names = {n.lower() for socket in PLUG_SOCKETS for n in table(socket)} - GENERIC
    assert {"lm_infinite", "streaming", "yarn", "swiglu"} <= names
    text = (ROOT / "lm/model/decoder.py").read_text(encoding="utf-8").lower()
    words = set(re.findall(r"[a-z0-9_]+", text)) | set(re.findall(r"[a-z0-9]+", text))
    assert names & words == set()


def test_no_path_of_one_machine() -> None:
    here = str(Path(__file__).relative_to(ROOT))
    path = re.compile(r"(?<![\w.])/(?:home/\w|Users/\w|root/|work/|tmp/[a-z]\w*/)")
    found = [
        f"{p.relative_to(ROOT)}: {m.group()}"
        for p, text in _texts()
        if str(p.relative_to(ROOT)) != here
        for m in path.finditer(text)
    ]
    assert found == []
    assert path.search("see /home/ann/x") and path.search('"/work/x"') and not path.search("a/work/x")


def test_nothing_pickles() -> None:
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    wrong = []
    for path in _sources(*PACKAGES):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{_module(path)}: {m}" for m in _imports(tree, _module(path)) if m.split(".")[0] in banned]
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{_module(path)}: allow_pickle")
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                wrong.append(f"{_module(path)}: torch.load")
    assert wrong == []


def _requirements() -> dict[str, int]:
    """Every requirement string of setup.py and its line."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            lists[node.targets[0].id] = node.value
    items = [*ast.walk(lists["BASE"])]
    extras = lists["EXTRAS"]
    assert isinstance(extras, ast.Dict)
    items += [n for value in extras.values for n in ast.walk(value)]
    return {n.value: n.lineno for n in items if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_every_requirement_is_a_range_with_a_reason() -> None:
    with (ROOT / "setup.py").open("rb") as f:
        comments = {t.start[0] for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT}
    requirements = _requirements()
    assert len(requirements) > 20
    for text, line in requirements.items():
        spec = text.split(";")[0]
        assert "==" in spec or (">=" in spec and "<" in spec), f"{text}: neither a range nor an exact pin"
        assert line in comments or line - 1 in comments, f"{text}: no comment says why"


def _documents() -> list[Path]:
    pages = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "colab/README.md")
    return [*pages, *sorted((ROOT / "docs").glob("*.md"))]


def test_documented_commands_exist() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in _documents())
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert "experiments.run" in modules
    assert {m for m in modules if importlib.util.find_spec(m) is None} == set()
    targets = set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= targets
    defined = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert targets <= defined


def test_documented_configs_and_scales_exist() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in _documents())
    for path, scale in set(re.findall(r"--config=(configs/\w+\.py)(?::(\w+))?", text)):
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert not scale or scale in module.SCALES, f"{path}:{scale}"


def test_links_lead_somewhere() -> None:
    broken = []
    for page in _documents():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


@pytest.mark.parametrize("socket", PLUG_SOCKETS)
def test_readme_lists_every_plug(socket: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {name for name in table(socket) if f"`{name}`" not in text} == set()


def test_importing_the_library_is_light() -> None:
    """`import lm` starts no backend and loads none of the heavy optional packages, nor `flax.nnx`."""
    code = (
        "import sys, lm, lm.model.decoder, lm.measures\n"
        "names = 'torch transformers tensorflow tensorflow_datasets gensim matplotlib flax.nnx'.split()\n"
        "heavy = [m for m in names if m in sys.modules]\n"
        "from jax._src import xla_bridge\n"
        "print(heavy, xla_bridge.backends_are_initialized())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] False"
