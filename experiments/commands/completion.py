"""What shells need to complete ``lab``: scripts without Python in them, so that a key press starts none."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Table = Mapping[str, Sequence[str]]  # the arguments of every command
CONFIGS = "configs/*.py"


def flags(folder: Path, places: Sequence[str]) -> list[str]:
    """The arguments that the files (``FILE`` or ``FILE:FUNCTION`` in `folder`) declare. They are read, not imported:
    most of them need jax."""
    found = {"--help"}
    for place in places:
        file, _, function = place.partition(":")
        tree: ast.AST = ast.parse((folder / file).read_text(encoding="utf-8"))
        if function:
            (tree,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
        found |= set(_declared(tree))
    return sorted(found)


def _declared(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (name for name in names if name.startswith("--"))


def bash(table: Table, about: Mapping[str, str]) -> str:
    """Readline may split a word at its ``=``; both ways of splitting are understood."""
    cases = "\n".join(f'        {name}) words="{" ".join(table[name])}" ;;' for name in table)
    return f"""# lab completion bash: put  eval "$(lab completion bash)"  into ~/.bashrc
_lab() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" flag="" start="" words=""
    COMPREPLY=()
    if [[ $cur == "=" ]]; then flag="$before" cur=""
    elif [[ $before == "=" ]]; then flag="${{COMP_WORDS[COMP_CWORD-2]}}"
    elif [[ $cur == --*=* ]]; then flag="${{cur%%=*}}" start="${{cur%%=*}}=" cur="${{cur#*=}}"
    fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{" ".join((*table, "completion"))}" -- "$cur"))
        return
    fi
    if [[ -n $flag ]]; then
        if [[ $flag == --config ]]; then COMPREPLY=($(compgen -W "$(compgen -G '{CONFIGS}')" -P "$start" -- "$cur")); fi
        if [[ ${{#COMPREPLY[@]}} == 0 ]]; then COMPREPLY=($(compgen -f -P "$start" -- "$cur")); fi
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
        completion) words="{" ".join(SHELLS)}" ;;
    esac
    if [[ $cur == -* || ${{COMP_WORDS[1]}} == completion ]]; then COMPREPLY=($(compgen -W "$words" -- "$cur"))
    else COMPREPLY=($(compgen -f -- "$cur"))
    fi
}}
complete -o filenames -F _lab lab"""


def zsh(table: Table, about: Mapping[str, str]) -> str:
    cases = "\n".join(f"            {name}) compadd -- {' '.join(table[name])} ;;" for name in table)
    return f"""#compdef lab
# lab completion zsh: put  eval "$(lab completion zsh)"  behind compinit in ~/.zshrc
_lab() {{
    if (( CURRENT == 2 )); then
        compadd -- {" ".join((*table, "completion"))}
        return
    fi
    case $PREFIX in
        --config=*) compset -P '*='; compadd -f -- {CONFIGS}(N); _files ;;
        --*=*) compset -P '*='; _files ;;
        -*) case $words[2] in
{cases}
        esac ;;
        *) if [[ $words[2] == completion ]]; then compadd -- {" ".join(SHELLS)}; else _files; fi ;;
    esac
}}
compdef _lab lab"""


def fish(table: Table, about: Mapping[str, str]) -> str:
    lines = ["# lab completion fish: lab completion fish > ~/.config/fish/completions/lab.fish"]
    first = "complete -c lab -n __fish_use_subcommand -f"
    lines += [f"{first} -a {name} -d {_quoted(about[name])}" for name in table]
    lines += [f"{first} -a completion -d 'what a shell needs to complete all this'"]
    within = "complete -c lab -n '__fish_seen_subcommand_from"
    lines += [f"{within} completion' -f -a '{' '.join(SHELLS)}'"]
    for name, words in table.items():
        for word in words:
            files = f" -r -a '({CONFIGS})'" if word == "--config" else ""
            lines.append(f"{within} {name}' -l {word.removeprefix('--')}{files}")
    return "\n".join(lines).replace(f"'({CONFIGS})'", f"'(for f in {CONFIGS}; echo $f; end)'")


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[Table, Mapping[str, str]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
