"""Draw docs/steering-table.svg: a plan as rows and steps of slots and strengths, read from a real table.

python scripts/steering_table_picture.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import torch

import pysteer
from pysteer.steering.given import vector

TARGET = Path(__file__).resolve().parent.parent / "docs" / "steering-table.svg"
CELL, LEFT, TOP = 92, 210, 84


def model() -> torch.nn.Module:
    """A language model of two layers with random weights; only its tables matter here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def table() -> tuple[list[list[int]], list[list[float]], list[str]]:
    """Slots and strengths `[steps][rows]` of one site, and the plan of every row in words."""
    words = ["nothing", "plan A, strength 0.5", "plan A, strength 1", "plan B, strength 2"]
    first, second = torch.ones(16), -torch.ones(16)
    plans = [
        pysteer.Plan.build([vector("block.1", first)], strength=0.0),
        pysteer.Plan.build([vector("block.1", first)], strength=0.5),
        pysteer.Plan.build([vector("block.1", first)], strength=1.0),
        pysteer.Plan.build([vector("block.1", second)], strength=2.0),
    ]
    network = model()
    with pysteer.steer(network, plans) as handle:
        network(torch.arange(12).reshape(4, 3))
        found = handle._parts[next(iter(handle._parts))].tables[0]
        slots, strengths = found.slot[:2, :4].tolist(), found.strength[:2, :4].tolist()
    return slots, strengths, words


def draw() -> str:
    """The picture as SVG text; colours follow the reader's scheme."""
    slots, strengths, words = table()
    width, height = LEFT + CELL * len(words) + 20, TOP + 4 * 40 + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="13" '
        'font-family="system-ui, sans-serif"><title>The steering table of a batch of four rows</title>',
        "<style>text{fill:#1c2126}.c{fill:#eaf2fc;stroke:#1a5fb4}.o{fill:#f4f6f8;stroke:#9aa4ae}"
        "@media(prefers-color-scheme:dark){text{fill:#eceff2}.c{fill:#1b2a3d;stroke:#7db4f5}"
        ".o{fill:#1f242a;stroke:#626c77}}</style>",
        '<text x="12" y="24" font-weight="600">One site, one batch: every row is a setting of its own</text>',
    ]
    for column, word in enumerate(words):
        x = LEFT + column * CELL
        name = word.partition(", ")[0]
        parts.append(f'<text x="{x + CELL / 2}" y="{TOP - 30}" text-anchor="middle">row {column}</text>')
        parts.append(f'<text x="{x + CELL / 2}" y="{TOP - 12}" text-anchor="middle">{escape(name)}</text>')
    tensors = (("slot", slots), ("strength", strengths))
    lines = [(f"{name}[{step}, r]", rows[step]) for name, rows in tensors for step in (0, 1)]
    for line, (title, values) in enumerate(lines):
        y = TOP + line * 40
        parts.append(f'<text x="12" y="{y + 25}">{escape(title)}</text>')
        for column, value in enumerate(values):
            kind = "o" if (slots[line % 2][column] == 0 or strengths[line % 2][column] == 0) else "c"
            x = LEFT + column * CELL
            parts.append(f'<rect class="{kind}" x="{x + 3}" y="{y + 4}" width="{CELL - 6}" height="32" rx="4"/>')
            parts.append(f'<text x="{x + CELL / 2}" y="{y + 25}" text-anchor="middle">{value:g}</text>')
    y = TOP + 4 * 40 + 28
    notes = (
        "clock: one number on the device says which step (0 reads the prompt, 1 writes).",
        "The kernel reads slot[clock, r] and strength[clock, r]; 0 leaves the row alone.",
    )
    parts += [f'<text x="12" y="{y + 20 * i}">{note}</text>' for i, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """Write the picture, or say whether the one that is there is what a table holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    drawn = draw()
    if parser.parse_args().check:
        return 0 if TARGET.read_text(encoding="utf-8") == drawn else 1
    TARGET.write_text(drawn, encoding="utf-8")
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
