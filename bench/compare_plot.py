"""A scatter plot as SVG: named points with vertical error bars, labels that keep clear of each other, the best ones
joined. Colours come from the page's style sheet by class."""
import html
import math

LABEL_WIDTH, LABEL_HEIGHT = 7.7, 15  # of a character, of a line; of a wide sans-serif at 13 px


FLOP_UNITS = (("GFLOPs", 1e9), ("MFLOPs", 1e6), ("kFLOPs", 1e3), ("FLOPs", 1))
TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def unit(values, units):
    """Name and size of the first unit that the largest value has at least 2 of, or the last."""
    return next(((name, size) for name, size in units if max(values) >= 2 * size), units[-1])


def ticks(low, high, most):
    """Round numbers inside [low, high], at most so many."""
    raw = (high - low) / most
    scale = 10 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decimals(values):
    """Digits after the point that show these ticks exactly."""
    step = min((b - a for a, b in zip(values, values[1:])), default=1)
    return max(0, math.ceil(-math.log10(step) - 1e-9) + (1 if f"{step:e}".startswith("2.5") else 0))


def spread(values, margin):
    low, high = min(values), max(values)
    room = margin * (high - low) or 0.05 * abs(high) or 1
    return low - room, high + room


def front(points):
    """The points that no other beats in both, from left to right."""
    best = []
    for p in sorted(points, key=lambda p: (p["x"], p["y"])):
        if not best or p["y"] < best[-1]["y"]:
            best.append(p)
    return best


def overlap(a, b):
    """Area that two boxes (x0, y0, x1, y1) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def label_places(px, py, name):
    """Boxes around a point at which its label may be, the best first: (penalty, x, y of the base line, anchor, box)."""
    width = LABEL_WIDTH * len(name)
    for ring, radius in enumerate((10, 22, 36, 54, 76)):
        for turn, (dx, dy) in enumerate(((1, 0), (-1, 0), (0.8, -0.7), (0.8, 0.7), (-0.8, -0.7), (-0.8, 0.7), (0, -1),
                                         (0, 1))):
            x, y = px + radius * dx, py + (radius + 3) * dy
            anchor, left = ("start", x) if dx > 0 else ("end", x - width) if dx < 0 else ("middle", x - width / 2)
            yield 40 * ring + turn, x, y + 4.5, anchor, (left, y - LABEL_HEIGHT / 2, left + width, y + LABEL_HEIGHT / 2)


def place_labels(points, frame):
    """A place for each label: greedily, the one that covers least of points, error bars and earlier labels."""
    taken = [(px - 9, py - 9, px + 9, py + 9) for px, py, _, _, _ in points]
    bars = [(px - 2, top, px + 2, bottom) for px, _, top, bottom, _ in points]
    places = {}
    for px, py, _, _, name in sorted(points):
        def cost(place):
            penalty, _, _, _, box = place
            outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, frame)
            over_bars, over_others = (sum(overlap(box, other) for other in boxes) for boxes in (bars, taken))
            return penalty + 3 * over_bars + 12 * over_others + 30 * outside

        best = min(label_places(px, py, name), key=cost)
        taken.append(best[4])
        places[name] = best
    return places


def axes(frame, x_range, y_range, x_label, y_label, to_x, to_y):
    left, top, right, bottom = frame
    out = ""
    y_ticks = ticks(*y_range, 6)
    for y in y_ticks:
        out += f'<path class="grid" d="M{left} {to_y(y):.1f}H{right}"/>'
        out += f'<text class="end" x="{left - 8}" y="{to_y(y) + 4:.1f}">{y:.{decimals(y_ticks)}f}</text>\n'
    x_ticks = ticks(*x_range, max(4, (right - left) // 120))
    for x in x_ticks:
        out += f'<path class="axis" d="M{to_x(x):.1f} {bottom}v5"/>'
        out += f'<text class="middle" x="{to_x(x):.1f}" y="{bottom + 20}">{x:.{decimals(x_ticks)}f}</text>\n'
    out += f'<path class="axis" d="M{left} {bottom}H{right}"/>\n'
    out += f'<text class="end" x="{right}" y="{bottom + 40}">{html.escape(x_label)}</text>\n'
    return out + f'<text class="start" x="{left - 48}" y="{top - 10}">{html.escape(y_label)}</text>\n'


def scatter(points, x_label, y_label, width, css):
    """Points: dicts of name, x, y, error (half the bar), tip. The first is shown in its own colour."""
    height = 460 if width > 600 else 400
    frame = left, top, right, bottom = 56, 30, width - 14, height - 50
    x_range = spread([p["x"] for p in points], 0.14)
    y_range = spread([p["y"] + sign * p["error"] for p in points for sign in (-1, 1)], 0.06)

    def to_x(x):
        return left + (x - x_range[0]) / (x_range[1] - x_range[0]) * (right - left)

    def to_y(y):
        return bottom - (y - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - top)

    out = f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_label)} against '
    out += f'{html.escape(x_label)}">\n' + axes(frame, x_range, y_range, x_label, y_label, to_x, to_y)
    best = front(points)
    steps = "".join(f"H{to_x(p['x']):.1f}V{to_y(p['y']):.1f}" for p in best[1:])
    out += f'<path class="front" d="M{to_x(best[0]["x"]):.1f} {to_y(best[0]["y"]):.1f}{steps}"/>\n'
    drawn = [(to_x(p["x"]), *(to_y(p["y"] + sign * p["error"]) for sign in (0, 1, -1)), p["name"]) for p in points]
    places = place_labels(drawn, frame)
    for p, (px, py, high, low, name) in zip(points, drawn):
        kind = "first" if p is points[0] else "best" if p in best else "other"
        _, x, y, anchor, box = places[name]
        out += f'<g class="{kind}"><title>{html.escape(p["tip"])}</title>'
        if p["error"]:
            ends = "".join(f"M{px - 4:.1f} {end:.1f}h8" for end in (high, low))
            out += f'<path class="error" d="M{px:.1f} {high:.1f}V{low:.1f}{ends}"/>'
        if math.hypot(x - px, y - 4.5 - py) > 15:
            out += f'<path class="leader" d="M{px:.1f} {py:.1f}L{x:.1f} {y - 4.5:.1f}"/>'
        out += f'<circle class="point" cx="{px:.1f}" cy="{py:.1f}" r="5.5"/>'
        out += f'<text class="label {anchor}" x="{x:.1f}" y="{y:.1f}">{html.escape(name)}</text></g>\n'
    return out + "</svg>\n"
