"""A report as one page that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p.sub, figcaption, td small, dt { color: var(--faint); } figure { margin: 1rem 0; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1.2rem; flex: 1 1 12rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.3; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_page(figures: Mapping[str, Any], pictures: Path, path: Path) -> None:
    """Write the page of a report.

    Args:
        figures: of ``report.json``.
        pictures: the folder of the report's PNG files, which are put into the page.
        path: of the page.
    """
    styles = figures["styles"]
    parts = [
        f"<h1>{len(styles)} style{'s' * (len(styles) > 1)} of one model</h1>",
        f'<p class="sub">{escape(figures["sources"]["student"]["source"])} beside its teachers: '
        f"{figures['num_images']} pictures of each style, compared in the features of "
        f"<b>{escape(figures['extractor'])}</b></p>",
        _cards(figures),
        "<h2>Teacher over student</h2>",
        _picture(pictures / "grid.png", "Student and teacher begin from the same noise."),
        "<h2>FID matrix</h2>",
        _picture(
            pictures / "fid_matrix.png",
            "Left: how far the student's style of a row is from the teacher of a column. Right: the same of the "
            "teachers' own second pictures, from other noise: the best that a student can do. Bold: a row's smallest.",
        ),
        f"<p>{_bias_told(figures)}</p>",
        "<h2>Style by style</h2>",
        _style_table(figures),
    ]
    if figures["score_error"]:
        parts += [
            "<h2>Score error</h2>",
            _picture(
                pictures / "score_error.png",
                "Squared distance of the student's predictions from the teacher's, as a share of the base's, on "
                "held-out latents. No pictures are made for it.",
            ),
        ]
    if figures["mixing"]:
        parts += ["<h2>Mixes of styles</h2>", _mixing(figures["mixing"])]
    parts += ["<h2>How this was made</h2>", _settings(figures)]
    body = "\n".join(parts)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>dmm: report</title><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def _cards(figures: Mapping[str, Any]) -> str:
    kid, pairwise, errors, judged = (figures[key] for key in ("kid", "pairwise", "score_error", "judged"))
    cards = [
        ("FIDt", f"{figures['fidt']:.4g}", f"the teachers' own: {figures['fidt_reference']:.4g}"),
        ("gap", f"{figures['fidt_gap_percent']:+.1f} %", "of FIDt to the teachers' own"),
        (
            "KID &times; 1000",
            _thousandths(kid["student"]["mean"]),
            f"the teachers' own: {_thousandths(kid['reference']['mean'])}",
        ),
        (
            "same noise, same picture?",
            f"{pairwise['psnr']['mean']['value']:.1f} dB",
            f"of other noise: {pairwise['psnr_of_other_noise']['mean']['value']:.1f} dB",
        ),
    ]
    if errors:
        cards.append(("score error", f"{errors['mean']:.3f}", "0: the teachers' scores; 1: the base's"))
    if judged:
        low, high = judged["both"]["interval"]
        cards.append(
            (
                "right style and thing",
                f"{judged['both']['mean_difference']:+.1f} points",
                f"beside the teachers; 95 %: {low:+.1f} to {high:+.1f}",
            )
        )
    inner = "".join(
        f'<div class="card">{title}<b>{value}</b><small>{more}</small></div>' for title, value, more in cards
    )
    return f'<div class="cards">{inner}</div>'


def _bias_told(figures: Mapping[str, Any]) -> str:
    bias = figures["fid_bias"]
    return (
        f"FID is too large for being taken on {figures['num_images']} pictures: by about {bias['fidt']:.3g} of the "
        f"student's FIDt and {bias['fidt_reference']:.3g} of the reference, by what half of the pictures show. "
        "Compare it only at one number of pictures; KID has no such bias."
    )


def _style_table(figures: Mapping[str, Any]) -> str:
    kid, pairwise, errors, judged = (figures[key] for key in ("kid", "pairwise", "score_error", "judged"))
    header = [
        "style",
        "FID",
        "reference",
        "KID &times; 1000",
        "reference",
        "feature distance",
        "of other noise",
        "PSNR, dB",
    ]
    header += ["score error", "on its own"] if errors else []
    header += ["right style, %", "right thing, %"] if judged else []
    rows = []
    for i, style in enumerate(figures["styles"]):
        row = [
            escape(style),
            f"{figures['fid_matrix'][i][i]:.3g}",
            f"{figures['fid_reference'][i][i]:.3g}",
            _thousandths(kid["student"]["by_style"][style]),
            _thousandths(kid["reference"]["by_style"][style]),
            f"{pairwise['feature_distance']['by_style'][style]['value']:.3f}",
            f"{pairwise['feature_distance_of_other_noise']['by_style'][style]['value']:.3f}",
            f"{pairwise['psnr']['by_style'][style]['value']:.1f}",
        ]
        row += [f"{one['by_style'][style]:.3f}" for one in (errors, errors["own"])] if errors else []
        for what in ("style", "concept") if judged else ():
            one = judged[what]
            row.append(f"{one['student'][style]:.1f} <small>({one['difference'][style]:+.1f})</small>")
        rows.append(row)
    told = _table(header, rows)
    if judged:
        told += (
            "<p>Right style and thing: of the student's pictures, by the judge; in parentheses, the difference to the "
            "teacher in points.</p>"
        )
    return told


def _mixing(mixing: Mapping[str, Any]) -> str:
    rows = [
        [escape(mix), escape(score), *(_measured(one[who]) for who in ("student", "weighted_merge", "difference"))]
        for mix, scores in mixing.items()
        for score, one in scores.items()
    ]
    return _table(["mix", "score", "student", "weighted merging", "difference"], rows)


def _measured(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.2g} <small>± {estimate['standard_error']:.1g}</small>"


def _thousandths(estimate: Mapping[str, float]) -> str:
    return f"{1000 * estimate['value']:.2f} <small>± {1000 * estimate['standard_error']:.2f}</small>"


def _settings(figures: Mapping[str, Any]) -> str:
    sources = figures["sources"]
    models = {"student": sources["student"], "base": sources["base"], **sources["teachers"]}
    rows = [[escape(name), escape(one["source"]), one["sha256"][:12]] for name, one in models.items() if one]
    facts = {**figures["settings"], **figures["versions"], "seconds": figures["seconds"]}
    listed = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value)) or '&ndash;'}</dd>"
        for name, value in facts.items()
    )
    return _table(["model", "source", "sha256"], rows) + f"<dl>{listed}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{caption}</figcaption></figure>'
