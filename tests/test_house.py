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

from experiments.commands.listing import SOCKETS, plugs
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
    "lm.trackers",
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
    "own",
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
    wrong = []
    for name, path in files.items():
        found = set(_imports(ast.parse(path.read_text(encoding="utf-8")), ""))
        wrong += [f"{name} imports {m}" for m in found if m.rpartition(".")[2] in files]
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


def test_the_model_names_no_plug() -> None:
    names = {n.lower() for socket in PLUG_SOCKETS for n in table(socket)} - GENERIC
    assert {"lm_infinite", "streaming", "yarn", "swiglu"} <= names
    for path in sorted((ROOT / "lm/model").glob("*.py")):
        text = path.read_text(encoding="utf-8").lower()
        words = set(re.findall(r"[a-z0-9_]+", text)) | set(re.findall(r"[a-z0-9]+", text))
        assert names & words == set(), path.name


def test_the_decoder_is_one_page() -> None:
    sizes = {name: len((ROOT / "lm/model" / name).read_text().splitlines()) for name in ("decoder.py", "block.py")}
    assert sizes["decoder.py"] <= 100 and sizes["block.py"] <= 60


def _functions(*packages: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in _sources(*packages):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def _arguments(node: ast.FunctionDef) -> list[ast.arg]:
    return [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]


def test_functions_are_short() -> None:
    """Eighty lines, kernel bodies apart; eight arguments in the kernels."""
    found = dict(_functions(*PACKAGES))
    assert len(found) > 1500
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in found.items() if node.end_lineno}
    assert {k: n for k, n in lines.items() if n > 80 and not k.startswith("kernels_pallas")} == {}
    many = {name: len(_arguments(node)) for name, node in _functions("kernels_pallas")}
    assert {name: n for name, n in many.items() if n > 8} == {}


def test_arguments_have_types() -> None:
    """Fewer than 8 in 100 annotated arguments are a bare `Any`."""
    notes = [a.annotation for _, node in _functions(*PACKAGES) for a in _arguments(node) if a.annotation is not None]
    bare = [n for n in notes if isinstance(n, ast.Name) and n.id == "Any"]
    assert len(notes) > 3000
    assert len(bare) < 0.08 * len(notes)


def test_plugs_have_no_hooks() -> None:
    """What others ask of a plug is a method of its base class: nobody looks whether an attribute is there. Objects of
    other libraries may be asked so."""
    foreign = {"lm/compat.py", "lm/data/texts/hf_datasets.py"}
    wrong = []
    for path in _sources("lm", "experiments"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
            ):
                hook = node.func.id == "hasattr" or len(node.args) > 2 or isinstance(node.args[1], ast.Constant)
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno}"] if hook else []
    assert {place for place in wrong if place.split(":")[0] not in foreign} == set()


def test_every_plug_inherits_its_sockets_base() -> None:
    for socket in PLUG_SOCKETS:
        bases = [{c.__qualname__ for c in cls.__mro__[1:]} - {"object", "Generic"} for cls in table(socket).values()]
        assert set.intersection(*bases), socket


def _knots(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for node in graph.get(todo.pop(), set()) - seen:
                seen.add(node)
                todo.append(node)
        return seen

    far = {node: reached(node) for node in graph}
    return sorted(
        {
            tuple(sorted({node} | {m for m in far[node] if node in far.get(m, set())}))
            for node in graph
            if node in far[node]
        }
    )


def test_folders_need_each_other_one_way() -> None:
    """The folders of `lm` as a graph, by what is imported when a module loads: no arrow leads back up."""
    graph: dict[str, set[str]] = {}
    for path in _sources("lm"):
        name = _module(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        top = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        found = {m for node in top for m in _imports(node, package) if m.startswith("lm.")}
        here = ".".join(name.split(".")[:2])
        graph.setdefault(here, set()).update({".".join(m.split(".")[:2]) for m in found} - {here})
    files = {_module(p) for p in _sources("lm")}
    graph = {k: {m for m in v if m in files} for k, v in graph.items() if k != "lm"}
    assert "lm.attention" in graph["lm.patterns"] and len(graph) > 20
    assert _knots(graph) == []
    assert _knots({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [("b", "c")]


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


@pytest.mark.parametrize("key", SOCKETS)
def test_plugs_are_listed(key: str) -> None:
    """`experiments.list --plugs` has every plug with what it computes; the README's table has no other names."""
    assert set(SOCKETS.values()) == set(PLUG_SOCKETS)
    rows = plugs(key)
    assert {row["name"] for row in rows} == set(table(SOCKETS[key])) and all(len(row["about"]) > 3 for row in rows)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| [^|]*\| `{re.escape(key)}`[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    named = re.findall(r"`([^`]+)`", re.sub(r"\([^)]*\)", "", row))
    assert set(named) - set(table(SOCKETS[key])) - {"quantize", "int8"} == set() and named


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
