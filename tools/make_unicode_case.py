#!/usr/bin/env python3
"""Writes src/data/unicode_case_tables.inc from Python's own tables (3.11 has Unicode 14, as has PCRE2 10.42).

    tools/make_unicode_case.py > src/data/unicode_case_tables.inc
"""
import unicodedata


def mappings(convert):
    """All code points above ASCII that `convert` changes: to one character as ranges {first, last, step, difference},
    to several as {code point, text}."""
    singles, multiples = [], []
    for code in range(0x80, 0x110000):
        if 0xD800 <= code < 0xE000 or convert(chr(code)) == chr(code):
            continue
        text = convert(chr(code))
        if len(text) == 1:
            singles.append((code, ord(text) - code))
        else:
            multiples.append((code, text))
    ranges, i = [], 0
    while i < len(singles):
        first, difference = singles[i]
        best, best_step = 1, 1
        for step in (1, 2):
            count = 1
            while i + count < len(singles) and singles[i + count] == (first + step * count, difference):
                count += 1
            if count > best:
                best, best_step = count, step
        ranges.append((first, first + (best - 1) * best_step, best_step, difference))
        i += best
    return ranges, multiples


def escape(text):
    return "".join(c if c.isascii() else "".join(f"\\{byte:03o}" for byte in c.encode()) for c in text)


def write(parts, begin, end):
    """Lines of at most 100 columns."""
    print(begin)
    line = "   "
    for part in parts:
        if len(line) + 1 + len(part) + 1 > 100:
            print(line)
            line = "   "
        line += f" {part},"
    print(line)
    print(end)


def main():
    print(f"// Case mappings of Unicode {unicodedata.unidata_version}, written by tools/make_unicode_case.py.")
    for name, convert in (("Upper", str.upper), ("Lower", str.lower), ("Title", str.title)):
        ranges, multiples = mappings(convert)
        if name == "Title":  # only what is not the upper case
            ranges, multiples = title_exceptions()
        write((f"{{0x{a:X}, 0x{b:X}, {s}, {d}}}" for a, b, s, d in ranges), f"constexpr Range k{name}Ranges[] = {{", "};")
        write((f'{{0x{c:X}, "{escape(t)}"}}' for c, t in multiples), f"constexpr Special k{name}Specials[] = {{", "};")


def title_exceptions():
    codes = [c for c in range(0x80, 0x110000) if not 0xD800 <= c < 0xE000 and chr(c).title() != chr(c).upper()]
    singles = [(c, c, 1, ord(chr(c).title()) - c) for c in codes if len(chr(c).title()) == 1]
    merged = []
    for first, last, step, difference in singles:
        if merged and merged[-1][3] == difference and merged[-1][1] + 1 == first:
            merged[-1] = (merged[-1][0], last, step, difference)
        else:
            merged.append((first, last, step, difference))
    return merged, [(c, chr(c).title()) for c in codes if len(chr(c).title()) != 1]


if __name__ == "__main__":
    main()
