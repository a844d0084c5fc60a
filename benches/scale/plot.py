#!/usr/bin/env python3
"""Draws what `side_by_side -- scale --csv FILE` has measured: three small charts beside each other, as SVG on stdout."""

import csv
import sys

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 260, 200, 56, 40, 40, 30
COLOURS = {("off", "proxy"): "#1b6ca8", ("off", "redis"): "#7fb3d5", ("coherent", "proxy"): "#b03a2e", ("coherent", "redis"): "#e6b0aa"}
NAMES = {("off", "proxy"): "proxy, uncached", ("off", "redis"): "Redis, uncached", ("coherent", "proxy"): "proxy, cached", ("coherent", "redis"): "Redis, cached"}
AXES = ["sessions", "gateways", "primaries"]


def chart(axis, rows, top, x0):
    counts = sorted({int(row["count"]) for row in rows})
    x = lambda count: x0 + LEFT + counts.index(count) * (WIDTH - LEFT - 20) / max(1, len(counts) - 1)
    y = lambda value: TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)
    yield f'<text x="{x0 + LEFT}" y="24" font-weight="bold">{axis}</text>'
    for step in range(5):
        value = top * step / 4
        yield f'<line x1="{x0 + LEFT}" x2="{x0 + WIDTH - 10}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
        yield f'<text x="{x0 + LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
    for count in counts:
        yield f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{count:,}</text>'
    for (cache, part), colour in COLOURS.items():
        points = sorted((int(row["count"]), float(row[part])) for row in rows if row["cache"] == cache)
        line = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for count, value in points:
            yield f'<circle cx="{x(count):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>'


def main():
    with open(sys.argv[1], newline="") as file:
        rows = list(csv.DictReader(file))
    top = max(float(row[part]) for row in rows for part in ("proxy", "redis")) * 1.1
    width = len(AXES) * (WIDTH + GAP)
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 40}" font-family="sans-serif" font-size="11" role="img">')
    print("<title>CPU seconds per 100,000 requests, by sessions, gateways and Redis primaries</title>")
    print(f'<rect width="{width}" height="{HEIGHT + 40}" fill="white"/>')
    for index, axis in enumerate(AXES):
        for element in chart(axis, [row for row in rows if row["axis"] == axis], top, index * (WIDTH + GAP)):
            print(element)
    for index, (key, colour) in enumerate(COLOURS.items()):
        x = LEFT + index * 150
        print(f'<rect x="{x}" y="{HEIGHT + 14}" width="12" height="12" fill="{colour}"/>')
        print(f'<text x="{x + 18}" y="{HEIGHT + 24}">{NAMES[key]}</text>')
    print("</svg>")


main()
