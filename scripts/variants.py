"""Add the stages of a sweep to saddlepoint/report/variants.json, the hardening variants that every report draws.

saddlepoint loop --max-tokens 56 --recipes 'refusal_sft, derta, derta(transition=1.0)' --out runs/sweep
python scripts/variants.py runs/sweep
"""

import json
import sys
from pathlib import Path

OUT = Path(__file__).parent.parent / "saddlepoint" / "report" / "variants.json"


def main(folders: list[str]) -> None:
    variants = []
    for folder in folders:
        summary = json.loads((Path(folder) / "summary.json").read_text())
        machine = summary["machine"]
        for stage in summary["stages"][1:]:
            training = stage["training"]
            note = (
                f"{training['examples']} examples, {training['seconds']:.0f} s of training on {machine['cores']} cores, {machine['date']}"
            )
            shares = {key: stage[key] for key in ("over_refusal", "clearance")}
            variants.append({"name": training["recipe"], "asr": stage["asr_any"], **shares, "note": note})
    known = json.loads(OUT.read_text())
    known["variants"] += variants
    OUT.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{OUT}: {len(variants)} variants")


if __name__ == "__main__":
    main(sys.argv[1:])
