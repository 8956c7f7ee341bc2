"""Small tables for notebooks."""

import html


def table(title: str, rows: dict[str, object]) -> str:
    """A two-column table under a title."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"
