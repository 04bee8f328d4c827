from pathlib import Path


def write_report(results: Path, folder: Path) -> Path:
    return folder / "REPORT.md"
