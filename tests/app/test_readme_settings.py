"""The README lists every setting, with the words of the code."""

from pathlib import Path

from app.jobs.settings import Settings

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_setting_stands_in_the_readme():
    for name, field in Settings.model_fields.items():
        row = next((line for line in README.splitlines() if line.startswith(f"| `PASSION_{name.upper()}` |")), None)
        assert row is not None, name
        assert row.endswith(f"| {field.description} |"), name
