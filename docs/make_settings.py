"""Make docs/settings.md: every setting, what becomes of it, and the test that shows it."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hfbridge.settings.legacy_names import OLD_NAMES  # noqa: E402
from hfbridge.settings.rules import DEFAULTS, RULES, SEQ2SEQ_FIELDS, Rule, show  # noqa: E402
from tests.parity.test_each_field import shown_by  # noqa: E402

TARGET = ROOT / "docs" / "settings.md"
KINDS = ("honoured", "in part", "translated", "refused")
HEAD = """\
# Every setting

The fields of `transformers.TrainingArguments` and, at the end, `Seq2SeqTrainingArguments`, by name.
*honoured*: every valid value does what it does in the HF Trainer. *in part*: unsupported values are
refused. *refused*: any value but the default is refused, by name, before a model is loaded. *translated*:
read under its name of today, as the names of transformers 4 are. Made by `python docs/make_settings.py` from
the rules that the library itself follows.

| setting | default | | goes to, or what is refused | shown by |
| --- | --- | --- | --- | --- |
"""


def kind_of(rule: Rule) -> str:
    if rule.name in OLD_NAMES:
        return "translated"
    if rule.support == "all":
        return "honoured"
    return "refused" if rule.support == "default" else "in part"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def row(name: str) -> str:
    rule = RULES[name]
    default = show(name, DEFAULTS[name]).partition(" = ")[2]
    text = rule.used_by if rule.support == "all" else rule.reason
    if rule.support == "some":
        text = f"{rule.used_by}; {rule.reason}"
    test = shown_by(name)
    path, _, node = test.partition("::")
    link = f"[{Path(path).name}](../{path})" + (f" `[{name}]`" if node else "")
    return f"| `{name}` | `{cell(default)}` | {kind_of(rule)} | {cell(text)} | {link} |"


def render() -> str:
    names = sorted(RULES, key=lambda name: (name in SEQ2SEQ_FIELDS, name))
    counts = [kind_of(rule) for rule in RULES.values()]
    total = ", ".join(f"{counts.count(kind)} {kind}" for kind in KINDS)
    return HEAD + "\n".join(map(row, names)) + f"\n\n{len(names)} settings: {total}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/settings.md is not up to date")
    arguments = parser.parse_args()
    if not arguments.check:
        TARGET.write_text(render())
        return 0
    if not TARGET.is_file() or TARGET.read_text() != render():
        print("docs/settings.md is not what the rules say: run python docs/make_settings.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
