"""
What a system knows about a command: ``python3 share/generate.py`` writes the man page and the shells' completions.

All of it is made from the parsers, so that no option is described twice.  tests/cli/test_share.py says when it is out of
date; setup.cfg has it installed with the package.
"""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentParser
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from socks5srv import __version__, check  # noqa: E402  (they are found by the line above)
from socks5srv.cli.options import COMMANDS, DESCRIPTION, EXAMPLES, build_parser  # noqa: E402

MADE = "made by python3 share/generate.py: do not edit it"
PARSERS: Dict[str, ArgumentParser] = {"": build_parser(), "check": check.build_parser("socks5srv check")}    # by the command that they are of


# --- what the parsers know ---

def options(command: str = "") -> List[Action]:
    return [action for action in PARSERS[command]._actions if action.option_strings]


def value_of(action: Action) -> str:
    """As it is written behind the option; empty for one that takes none."""
    return "" if action.nargs == 0 else "|".join(action.choices or [str(action.metavar or action.dest.upper())])


def short_help(action: Action) -> str:
    """Its first clause, which fits in a line of a list."""
    return re.split(r"[;.:] | \(", action.help or "")[0].rstrip(".")


def commands() -> List[Tuple[str, str]]:
    """The commands beside the plain start, each with what the help says of it."""
    found = re.findall(r"^  socks5srv (\S+).*?  +(\S.*)$", DESCRIPTION, re.MULTILINE)
    assert [name for name, _help in found] == list(COMMANDS)
    return found


# --- the man page; see man-pages(7) ---

ROFF = {"\\": "\\e", "-": "\\-", "'": "\\(aq"}


def roff(text: str) -> str:
    """Text as troff has it: no line of it is a request, and what is pasted from it is ASCII."""
    escaped = "".join(ROFF.get(letter, letter) for letter in " ".join(text.split()))
    return f"\\&{escaped}" if escaped.startswith(".") else escaped


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def entry(action: Action) -> str:
    names = ", ".join(f"\\fB{roff(name)}\\fR" for name in action.option_strings or [str(action.metavar)])
    value = f" \\fI{roff(value_of(action))}\\fR" if action.option_strings and value_of(action) else ""
    return f".TP\n{names}{value}\n{roff(sentence(action.help or ''))}"


def man_page() -> str:
    description = DESCRIPTION.partition("\n\n")[0]
    examples = re.findall(r"^  (socks5srv.*?)(?:  +(\S.*))?$", EXAMPLES, re.MULTILINE)
    end = EXAMPLES.rpartition("\n\n")[2]
    codes = re.findall(r"(\d+) ([^,.]+)", end.partition("Exit codes: ")[2])
    lines = [
        f'.\\" {MADE}', f'.TH SOCKS5SRV 1 "" "socks5srv {__version__}" "User Commands"', ".nh",
        ".SH NAME", "socks5srv \\- a SOCKS5 proxy server",
        ".SH SYNOPSIS", ".B socks5srv", "[\\fIoptions\\fR] [\\fIPORT\\fR | \\fIADDRESS\\fR:\\fIPORT\\fR]", ".br",
        ".B socks5srv check", "\\fIHOST\\fR:\\fIPORT\\fR [\\fIoptions\\fR]", ".br",
        ".B socks5srv explain", "\\fIHEX\\fR...", ".br", ".B socks5srv hash\\-password",
        ".SH DESCRIPTION", roff(description),
        ".SH COMMANDS", *(f".TP\n.B {roff(name)}\n{roff(sentence(help))}" for name, help in commands()),
        ".SH OPTIONS",
    ]
    for group in PARSERS[""]._action_groups:
        if group._group_actions:
            lines += [f'.SS "{roff(group.title or "")}"', *map(entry, group._group_actions)]
    lines += [
        '.SS "Options of socks5srv check"', *(entry(action) for action in options("check")),
        ".SH FILES", ".TP\n.RI @ FILE\nRead options from FILE, one or more a line; # begins a comment.",
        ".SH ENVIRONMENT",
        ".TP\n.B SOCKS5SRV_OPTIONS\nFurther options, read before those of the command line.",
        f".TP\n.B SOCKS5SRV_PASSWORD\n{roff('The password of a --user NAME without one.')}",
        f".TP\n.B NO_COLOR\n{roff('No color in the log, unless --color always asks for it.')}",
        ".SH EXIT STATUS", *(f".TP\n.B {code}\n{roff(sentence(meaning))}" for code, meaning in codes),
        f".PP\n{roff('With --run it is that of COMMAND.  socks5srv check exits with 1 if an assertion has failed.')}",
        ".SH EXAMPLES", *(f".TP\n.B {roff(line)}\n{roff(sentence(help)) if help else chr(92) + '&'}" for line, help in examples),
        ".SH SEE ALSO", ".BR curl (1),", ".BR ssh (1)", ".PP", "https://socks5srv.readthedocs.io/",
    ]
    return "\n".join(lines) + "\n"


# --- the shells ---

BASH = """\
# bash completion for socks5srv; {made}

_socks5srv_files() {{
    local IFS=$'\\n'                         # a blank may be in a name
    COMPREPLY=($(compgen "$@"))
}}

_socks5srv() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} i
    COMPREPLY=()
    if [[ $cur == "=" ]]; then              # --option=value is three words
        cur=""
    elif [[ $prev == "=" ]]; then
        prev=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${{COMP_WORDS[i]}} == --run ]]; then
            if ((i == COMP_CWORD - 1)); then _socks5srv_files -c -- "$cur"; else _socks5srv_files -f -- "$cur"; fi
            return
        fi
    done
    if ((COMP_CWORD > 1)); then
        case ${{COMP_WORDS[1]}} in
            check)
                case $prev in
                    {check_values}) return ;;
                esac
                COMPREPLY=($(compgen -W "{check}" -- "$cur")); return ;;
            explain|hash-password)
                COMPREPLY=($(compgen -W "--help" -- "$cur")); return ;;
        esac
    fi
    case $prev in
{choices}
        {files}) _socks5srv_files -f -- "$cur"; return ;;
        {values}) return ;;
    esac
    case $cur in
        -*) COMPREPLY=($(compgen -W "{options}" -- "$cur")) ;;
        @*) _socks5srv_files -P @ -f -- "${{cur#@}}" ;;
        *) if ((COMP_CWORD == 1)); then COMPREPLY=($(compgen -W "{commands}" -- "$cur")); fi ;;
    esac
}}
complete -o filenames -F _socks5srv socks5srv
"""


def names(actions: List[Action], between: str) -> str:
    return between.join(name for action in actions for name in action.option_strings)


def bash() -> str:
    with_value = [action for action in options() if value_of(action)]
    chosen = [action for action in with_value if action.choices]
    return BASH.format(
        made=MADE, check=names(options("check"), " "), check_values=names([action for action in options("check") if value_of(action)], "|"),
        options=names(options(), " "), commands=" ".join(COMMANDS), values=names(with_value, "|"),
        files=names([action for action in with_value if action.metavar == "FILE"], "|"),
        choices="\n".join(
            f'        {names([action], "|")}) COMPREPLY=($(compgen -W "{" ".join(action.choices or ())}" -- "$cur")); return ;;' for action in chosen
        ),
    )


def in_quotes(text: str) -> str:
    """For a shell, which takes what is in single quotes as it is."""
    return "'" + text.replace("'", "'\\''") + "'"


def zsh_specs(command: str = "") -> Iterator[str]:
    """An option each, as _arguments wants it: names, [help], what the value is called, and how it is found."""
    for action in options(command):
        forms = action.option_strings
        names = "{" + ",".join(forms) + "}" if len(forms) > 1 else forms[0]
        text = re.sub(r"([\[\]:\\])", r"\\\1", short_help(action))
        value = re.sub(r"([\[\]:\\])", r"\\\1", str(action.metavar or " "))
        found = "_files" if action.metavar == "FILE" else f"({' '.join(action.choices)})" if action.choices else ""
        if action.dest == "command":
            spec = f"[{text}]:*::COMMAND:_normal"
        else:
            spec = f"[{text}]" + f":{value}:{found}" * bool(value_of(action))
        yield f"'*'{names}{in_quotes(spec)}"


def zsh() -> str:
    specs, of_check = (" \\\n        ".join(zsh_specs(command)) for command in ("", "check"))
    listed = " ".join(in_quotes(f"{name}:{help}") for name, help in commands())
    return f"""\
#compdef socks5srv
# {MADE}

_socks5srv_first() {{
    local -a commands=({listed})
    if compset -P @; then _files; elif ((CURRENT == 2)); then _describe command commands; fi
}}

_socks5srv() {{
    if ((CURRENT > 2)); then
        case $words[2] in
            check)
                shift words; ((CURRENT--))
                _arguments '1:HOST\\:PORT:' \\
        {of_check}
                return ;;
            explain|hash-password) return ;;
        esac
    fi
    _arguments -s '*:PORT:_socks5srv_first' \\
        {specs}
}}

_socks5srv "$@"
"""


def fish() -> str:
    lines = [f"# fish completion for socks5srv; {MADE}", "complete -c socks5srv -f"]
    for name, help in commands():
        lines.append(f"complete -c socks5srv -n __fish_is_first_arg -a {name} -d {in_quotes(help)}")
    for command, condition in (("", f"not __fish_seen_subcommand_from {' '.join(COMMANDS)}"), ("check", "__fish_seen_subcommand_from check")):
        for action in options(command):
            forms = " ".join(f"-l {form[2:]}" if form.startswith("--") else f"-s {form[1:]}" for form in action.option_strings)
            value = "" if not value_of(action) else " -r -F" if action.metavar in ("FILE", "COMMAND") else " -x"
            choices = f" -a {in_quotes(' '.join(action.choices))}" if action.choices else ""
            lines.append(f"complete -c socks5srv -n {in_quotes(condition)} {forms}{value}{choices} -d {in_quotes(short_help(action))}")
    return "\n".join(lines) + "\n"


def files() -> Dict[Path, str]:
    """What has to be in which file."""
    return {
        HERE / "man/man1/socks5srv.1": man_page(), HERE / "bash-completion/completions/socks5srv": bash(),
        HERE / "zsh/site-functions/_socks5srv": zsh(), HERE / "fish/vendor_completions.d/socks5srv.fish": fish(),
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
