"""A report as one page that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from dmm.report.verdict import model_name, verdict

_STYLE = """
:root {
  color-scheme: light dark; --line: #8886; --faint: light-dark(#555, #aaa); --tint: light-dark(#f4f6fa, #23262c);
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 2rem; }
h1 { margin: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p.verdict { font-size: 1.35rem; line-height: 1.4; margin: 1rem 0; max-width: 60rem; }
p.sub, figcaption, small, dt { color: var(--faint); } figure { margin: 1rem 0; }
p { max-width: 52rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
figure.wide { width: calc(100vw - 5rem); margin-left: calc(50% - 50vw + 2.5rem); }
.grow input { position: absolute; opacity: 0; }
.grow img { width: min(100%, var(--most)); display: block; cursor: zoom-in; }
.grow:focus-within img { outline: 2px solid; }
.grow:has(:checked) { position: fixed; inset: 0; overflow: auto; background: Canvas; z-index: 1; }
.grow :checked + img { width: max(100%, 2400px); max-width: none; cursor: zoom-out; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1.2rem; background: var(--tint); }
.card b { display: block; font-size: 1.7rem; line-height: 1.3; }
.card b small { font-size: 1rem; font-weight: 400; }
.card > small { display: block; line-height: 1.35; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } th { font-weight: 600; vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; }
table.sources td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.sources td:not(:nth-child(2)) { white-space: nowrap; } table.sources th { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""
_TEXT_WIDTH = 1152  # pixels, of what the style sheet leaves of 76rem


def write_page(figures: Mapping[str, Any], pictures: Path, path: Path) -> None:
    """Write the page of a report.

    Args:
        figures: of ``report.json``.
        pictures: the folder of the report's PNG files, which are put into the page.
        path: of the page.
    """
    styles, name = figures["styles"], escape(model_name(figures))
    parts = [
        f"<h1>{name}: {len(styles)} style{'s' * (len(styles) > 1)} beside {'their' if len(styles) > 1 else 'its'} "
        f"teacher{'s' * (len(styles) > 1)}</h1>",
        f'<p class="verdict">{escape(verdict(figures))}</p>',
        f"<p class='sub'>{figures['num_images']} pictures of each style, compared in the features of "
        f"<b>{escape(figures['extractor'])}</b></p>",
        _cards(figures),
        "<h2>Teacher over student</h2>",
        _grid(pictures / "grid.png", "Student and teacher begin from the same noise. A click makes it larger."),
        *(_fid(figures, pictures) if figures["fid_matrix"] else [f"<p>{_NO_FID}</p>"]),
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
        f'<meta name="viewport" content="width=device-width"><title>{name} &ndash; dmm evaluate</title>'
        f"<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


_NO_FID = (
    "A quick evaluation has no FID, which needs many pictures; what it has tells of what one sees in the grid, and "
    "whether it is time for a whole one."
)


def _fid(figures: Mapping[str, Any], pictures: Path) -> list[str]:
    return [
        "<h2>FID matrix</h2>",
        _picture(
            pictures / "fid_matrix.png",
            "Left: how far the student's style of a row is from the teacher of a column. Right: the same of the "
            "teachers' own second pictures, from other noise: the best that a student can do. Bold: a row's smallest.",
        ),
        f"<p>{_bias_told(figures)}</p>",
    ]


def _cards(figures: Mapping[str, Any]) -> str:
    kid, pairwise, errors, judged = (figures[key] for key in ("kid", "pairwise", "score_error", "judged"))
    apart, other = (_mean(pairwise, key) for key in ("feature_distance", "feature_distance_of_other_noise"))
    cards = [
        (
            "distance from the teacher",
            f"{100 * apart / other:.0f} %" if other else "&ndash;",
            "of that between the teacher's own pictures from two noises, in features; "
            f"{_mean(pairwise, 'psnr'):.1f} dB PSNR, {_mean(pairwise, 'psnr_of_other_noise'):.1f} dB of other noise",
        ),
        (
            "KID &times; 1000",
            _thousandths(kid["student"]["mean"]),
            f"the teachers' own: {_thousandths(kid['reference']['mean'])}",
        ),
    ]
    if figures["fid_matrix"]:
        fidt = (
            "FIDt",
            f"{figures['fidt']:.4g}",
            f"the teachers' own: {figures['fidt_reference']:.4g}, {figures['fidt_gap_percent']:+.1f} %",
        )
        cards.insert(1, fidt)
    if errors:
        learnt = (
            "learnt of the teachers",
            f"{100 * (1 - errors['mean']):.0f} %",
            f"0 %: predicts as the base does, 100 %: as the teachers; score error {errors['mean']:.3f}",
        )
        cards.insert(0, learnt)
    if judged:
        low, high = judged["both"]["interval"]
        right = (
            "right style and thing",
            f"{judged['both']['mean_difference']:+.1f} <small>points</small>",
            f"pictures in 100, beside the teachers; 95 %: {low:+.1f} to {high:+.1f}",
        )
        cards.insert(0, right)
    inner = "".join(
        f'<div class="card">{title}<b>{value}</b><small>{more}</small></div>' for title, value, more in cards
    )
    return f'<div class="cards">{inner}</div>'


def _mean(pairwise: Mapping[str, Any], key: str) -> float:
    return float(pairwise[key]["mean"]["value"])


def _bias_told(figures: Mapping[str, Any]) -> str:
    bias = figures["fid_bias"]
    return (
        f"FID is too large for being taken on {figures['num_images']} pictures: by about {bias['fidt']:.3g} of the "
        f"student's FIDt and {bias['fidt_reference']:.3g} of the reference, by what half of the pictures show. "
        "Compare it only at one number of pictures; KID has no such bias."
    )


def _style_table(figures: Mapping[str, Any]) -> str:
    kid, pairwise, errors, judged = (figures[key] for key in ("kid", "pairwise", "score_error", "judged"))
    header = ["style", *(["FID", "reference"] if figures["fid_matrix"] else [])]
    header += [
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
        row = [escape(style)]
        row += [f"{figures[key][i][i]:.3g}" for key in ("fid_matrix", "fid_reference") if figures[key]]
        row += [
            _thousandths(kid["student"]["by_style"][style]),
            _thousandths(kid["reference"]["by_style"][style]),
            f"{pairwise['feature_distance']['by_style'][style]['value']:.3f}",
            f"{pairwise['feature_distance_of_other_noise']['by_style'][style]['value']:.3f}",
            f"{pairwise['psnr']['by_style'][style]['value']:.1f}",
        ]
        row += [f"{one['by_style'][style]:.3f}" for one in (errors, errors["own"])] if errors else []
        for what in ("style", "concept") if judged else ():
            one = judged[what]
            known = style in one["student"]
            row.append(
                f"{one['student'][style]:.1f} <small>({one['difference'][style]:+.1f})</small>" if known else "&ndash;"
            )
        rows.append(row)
    told = _table(header, rows)
    if judged:
        told += (
            "<p>Right style and thing: of the student's pictures, by the judge; in parentheses, the difference to the "
            "teacher in points; a dash where the judge does not know the style.</p>"
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
    return _table(["model", "source", "sha256"], rows, "sources") + f"<dl>{listed}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _picture(path: Path, caption: str) -> str:
    return f'<figure><img src="{_inlined(path)}" alt=""><figcaption>{caption}</figcaption></figure>'


def _grid(path: Path, caption: str) -> str:
    """A picture as wide as the page, but at most at twice its size, and wider on a click, which needs no script."""
    with Image.open(path) as image:
        most = 2 * image.width
    picture = f'<input type="checkbox" aria-label="larger"><img src="{_inlined(path)}" alt="" style="--most:{most}px">'
    kind = ' class="wide"' if most > _TEXT_WIDTH else ""
    return f'<figure{kind}><label class="grow">{picture}</label><figcaption>{caption}</figcaption></figure>'


def _inlined(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
