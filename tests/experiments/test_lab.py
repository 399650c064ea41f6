"""One name for every command: the table, its help, what shells complete, and what a wheel claims."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments import lab
from experiments.commands import completion

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")


def commands() -> set[str]:
    """What ``python -m experiments.X`` runs."""
    files = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments").glob("*/__main__.py")]
    runs = [p for p in files if '__name__ == "__main__"' in p.read_text(encoding="utf-8")]
    return {p.parent.name if p.name == "__main__.py" else p.stem for p in runs}


def test_every_command_is_in_the_table() -> None:
    assert commands() - {"lab"} == set(lab.COMMANDS) and {"run", "serve", "certificates"} <= commands()


def test_help_lists_the_commands_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert lab.main([]) == 0 and capsys.readouterr().out == text
    for name in lab.COMMANDS:
        (line,) = re.findall(rf"^  {name} +(\S.*)$", text, re.MULTILINE)
        assert line == lab.about(name) and line.endswith(".") and "``" not in line


def test_neither_help_nor_completion_loads_jax() -> None:
    code = (
        "import sys; from experiments import lab; "
        "codes = [lab.main(w) for w in (['--help'], ['completion', 'bash'], ['completion', 'fish'], ['rum'])]; "
        "print(codes, [m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().split("\n")[-1] == "[0, 0, 0, 2] []"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["genrate"], "lab: unknown name 'genrate' (did you mean 'generate'?); valid: certificates, chat, compile"),
        (["completion"], "lab completion: found nothing; valid: bash, zsh, fish"),
        (["completion", "tcsh"], "lab completion: found tcsh"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.main(words) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""


def test_a_wheel_refuses_what_writes_into_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lab, "REPOSITORY", tmp_path / "none")
    for name in lab.THERE:
        assert lab.main([name]) == 2
        assert f"lab {name}: writes into the repository" in capsys.readouterr().err


@pytest.mark.parametrize("name", lab.COMMANDS)
def test_a_command_is_what_python_m_runs_and_completes_what_it_takes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own help, by way of the table, names just the arguments that shells complete."""
    module = f"experiments.{name}" + (".__main__" if (ROOT / "experiments" / name).is_dir() else "")
    monkeypatch.setattr("experiments.cli.enter", lambda fn: sys.exit(fn()))  # signals are left as they are
    for known in (module, f"experiments.{name}"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as end:
        lab.main([name, "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    options = re.findall(r"^ {2}(-.*)$", text[text.index("options:") :], re.MULTILINE)
    declared = {flag for line in options for flag in re.findall(r"--[a-z][a-z-]*", line.split("  ")[0])}
    assert declared == set(completion.flags(ROOT / "experiments", lab.COMMANDS[name])) and "--help" in declared


def completed(script: str, *words: str, cwd: Path = ROOT) -> list[str]:
    """What bash offers for the last word, split as readline splits it."""
    given = " ".join(f"'{w}'" for w in words)
    code = f'{script}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _lab; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run([str(BASH), "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_bash_completes_commands_arguments_and_config_files(tmp_path: Path) -> None:
    script = lab.script(["bash"])
    assert completed(script, "lab", "") == [*lab.COMMANDS, "completion"]
    assert completed(script, "lab", "re") == ["report", "results_page"]
    assert completed(script, "lab", "completion", "") == ["bash", "zsh", "fish"]
    assert completed(script, "lab", "serve", "--po") == ["--port"]
    assert completed(script, "lab", "chat", "--te") == ["--temperature", "--template"]
    configs = completed(script, "lab", "run", "--config", "=")
    assert "configs/lm_infinite.py" in configs and all(c.endswith(".py") for c in configs)
    assert completed(script, "lab", "run", "--config", "=", "configs/lm_") == ["configs/lm_infinite.py"]
    assert completed(script, "lab", "run", "--config=configs/lm_") == ["--config=configs/lm_infinite.py"]
    (tmp_path / "mine.py").touch()
    assert completed(script, "lab", "run", "--config", "=", "mi", cwd=tmp_path) == ["mine.py"]
    assert completed(script, "lab", "generate", "--checkpoint", "=", "mi", cwd=tmp_path) == ["mine.py"]
    assert completed(script, "lab", "report", "mi", cwd=tmp_path) == ["mine.py"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_every_command_and_argument(shell: str) -> None:
    script = lab.script([shell])
    for name in lab.COMMANDS:
        assert re.search(rf"\b{name}\b", script)
        for flag in completion.flags(ROOT / "experiments", lab.COMMANDS[name]):
            assert flag in script or f"-l {flag.removeprefix('--')}" in script
    if (program := shutil.which(shell)) is not None:
        subprocess.run([program, "-n", "-c", script], check=True)


def test_a_wheel_claims_no_plain_name_but_its_own(tmp_path: Path) -> None:
    """Built from a copy, so that nothing is left in the repository."""
    for name in ("lm", "experiments", "configs", "kernels_pallas"):
        shutil.copytree(ROOT / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / "src" / file)
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(tmp_path / "src")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("decoder_lab-*.whl")
    with zipfile.ZipFile(wheel) as made:
        names = {n.split("/")[0] for n in made.namelist() if ".dist-info/" not in n}
        (points,) = (made.read(n).decode() for n in made.namelist() if n.endswith("/entry_points.txt"))
    assert names == {"lm", "experiments", "kernels_pallas"}
    assert points.split("\n")[:2] == ["[console_scripts]", "lab = experiments.lab:main"]
