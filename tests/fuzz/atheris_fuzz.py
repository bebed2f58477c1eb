"""Fuzzing of one reader by coverage: ``python tests/fuzz/atheris_fuzz.py TARGET [options of libFuzzer]``; needs atheris."""

import random
import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports] - no wheel of it exists for many Pythons

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["sparsary"]):
    import targets


def main() -> None:
    target = targets.TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as home:
        valid, folder = Path(home) / "valid", Path(home) / "damaged"
        valid.mkdir()
        target.build(valid)

        def once(content: bytes) -> None:
            # The first bytes choose the file and the kind of damage; the rest is put into the file.
            draw = random.Random(content[:8])
            targets.disturb(target, valid, folder, draw)
            if len(content) > 8:
                path = folder / draw.choice(target.names)
                whole = path.read_bytes()
                place = draw.randrange(len(whole) + 1)
                path.write_bytes(whole[:place] + content[8:] + whole[place + len(content) - 8 :])
            targets.check(target, folder)

        atheris.Setup(sys.argv, once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
