// The style sheet and the script of the HTML page.
#include "report/html_parts.h"

namespace detour::report {

// Palette: six hues that differ in lightness too and keep 3:1 against the paper, in both themes.
const char kPageStyle[] = R"css(
:root {
  --paper: #fcfbf9; --ink: #1d1f23; --soft: #565c66; --rule: #ddd9d0; --panel: #f4f2ed;
  --on: #1c5f9c; --on-rgb: 28 95 156; --shade: .42; --off: #e3e7ea; --dense: #b3b0a8;
  --c0: #1c5f9c; --c1: #c2501a; --c2: #2b7a5c; --c3: #7a529f; --c4: #8d6e14; --c5: #5b6672;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171b; --ink: #e6e5e1; --soft: #a3a8b1; --rule: #34383f; --panel: #1d2025;
  --on: #6aaee6; --on-rgb: 78 150 214; --shade: .62; --off: #2a2f36; --dense: #666970;
  --c0: #6aaee6; --c1: #ee8f5a; --c2: #5fbd98; --c3: #b796dd; --c4: #d0b04f; --c5: #a0acb9;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 var(--serif);
  -webkit-text-size-adjust: 100%; }
main { max-width: 1000px; margin: 0 auto; padding: 56px 32px 72px; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 20px; margin-bottom: 28px; }
h1 { font-size: 38px; line-height: 1.15; letter-spacing: -.01em; margin: 0; font-weight: 600;
  text-wrap: balance; }
.subtitle { color: var(--soft); font-size: 19px; line-height: 1.45; margin: 12px 0 0;
  max-width: 44em; }
h2 { font-size: 25px; line-height: 1.25; font-weight: 600; margin: 60px 0 10px; }
h3 { font: 600 15px/1.4 var(--sans); margin: 0 0 8px; }
p { max-width: 42em; margin: 0 0 14px; overflow-wrap: anywhere; }
figure { margin: 26px 0 34px; }
figcaption { font: 14px/1.5 var(--sans); color: var(--soft); margin-top: 10px; max-width: 52em; }
footer { margin-top: 64px; padding-top: 14px; border-top: 1px solid var(--rule); color: var(--soft);
  font: 13px/1.55 var(--sans); }
footer p { margin: 0 0 4px; max-width: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr));
  gap: 22px 28px;
  margin: 30px 0; }
.figures div { border-top: 1px solid var(--rule); padding-top: 10px; }
.figures dt { font: 13px/1.4 var(--sans); color: var(--soft); }
.figures dd { margin: 2px 0 0; font-size: 32px; line-height: 1.2;
  font-variant-numeric: lining-nums; }
.figures dd.detail { font: 13px/1.4 var(--sans); color: var(--soft); margin-top: 4px; }
.scroll { overflow-x: auto; max-width: 760px; } .scroll.full { max-width: none; }
table { border-collapse: collapse; width: 100%; font: 15px/1.4 var(--sans);
  font-variant-numeric: tabular-nums lining-nums; }
th, td { text-align: right; padding: 7px 0 7px 24px; vertical-align: baseline; font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 1px solid var(--ink); }
tr.section th { font-weight: 600; padding-top: 20px; color: var(--soft); font-size: 13px; }
tbody tr.section + tr > * { border-top-color: var(--ink); }
th small { display: block; font-size: 12.5px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 3px 20px; font: 13.5px/1.5 var(--sans);
  color: var(--soft);
  margin-bottom: 10px; }
.legend span { display: inline-flex; align-items: center; gap: 7px; }
.legend i { flex: none; }
.key { width: 22px; border-top: 2.5px solid currentColor; }
.key.dashed { border-top-style: dashed; } .key.faint { opacity: .45; }
.key.ref { color: var(--ink); border-top-width: 1.5px; }
.rail { width: 18px; height: 3px; background: var(--dense); }
.sw { width: 13px; height: 13px; border-radius: 2px; background: currentColor; }
.sw.on { background: var(--on); } .sw.off { background: var(--off); }
.sw.dense { background: var(--dense); }
.ramp { width: 46px; height: 13px; border-radius: 2px;
  background: linear-gradient(90deg, rgb(var(--on-rgb) / 0), rgb(var(--on-rgb) / var(--shade))); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.chart svg { display: block; width: 100%; height: auto; touch-action: pan-y;
  font-family: var(--sans); }
.chart svg.narrow { display: none; max-width: 520px; }
svg text { fill: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .label { font-size: 13px; }
svg .value { font-size: 11px; fill: var(--ink); }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 1.9; stroke-linejoin: round;
  stroke-linecap: round; }
.line.dashed { stroke-dasharray: 6 5; }
.line.faint { stroke-width: 1.1; opacity: .45; }
.dot { fill: currentColor; }
.bar { fill: currentColor; } .bar.muted { fill: var(--dense); } .bar:hover { opacity: .75; }
.reference { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 5 4; fill: none; }
.guide { stroke: var(--soft); stroke-width: 1; }
.hover circle { fill: currentColor; stroke: var(--paper); stroke-width: 1.5; }
.map { position: relative; padding-left: 30px; }
.gutter { position: absolute; left: 0; top: 0; width: 26px; height: 100%; }
.gutter .lane { font: 8.5px var(--sans); text-anchor: end; }
.flow { font-size: 0; line-height: 0; }
.w { display: inline-block; vertical-align: top; white-space: nowrap; max-width: 100%; }
.t { display: inline-block; vertical-align: top; max-width: 100%; padding: 0 1px 12px 0;
  cursor: default; }
.t b { display: block; height: 20px; margin-bottom: 2px; font: 15px/20px var(--serif);
  white-space: pre;
  overflow: hidden; text-overflow: ellipsis; min-width: 5px; border-radius: 2px;
  background: rgb(var(--on-rgb) / calc(var(--a) * var(--shade))); }
.t svg { display: block; width: 100%; height: var(--lanes); shape-rendering: crispEdges; }
.t .on { fill: var(--on); } .t .off { fill: var(--off); } .t .dense { fill: var(--dense); }
.t.hot b { outline: 1.5px solid var(--ink); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 8px 32px; }
.samples figure { margin: 14px 0; }
pre { font: 16px/1.6 var(--serif); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: 16px 20px;
  background: var(--panel); border-left: 3px solid var(--rule); tab-size: 4; }
.prompt { color: var(--soft); font-style: italic; }
#tip { position: fixed; z-index: 9; left: 0; top: 0; pointer-events: none;
  background: var(--paper); color: var(--ink);
  border: 1px solid var(--soft); border-radius: 4px; padding: 7px 10px; font: 13px/1.45 var(--sans);
  font-variant-numeric: tabular-nums; box-shadow: 0 3px 14px rgb(0 0 0 / .16); max-width: 300px; }
#tip .head { font-weight: 600; overflow-wrap: anywhere; white-space: pre-wrap; }
#tip .row { display: flex; justify-content: space-between; gap: 18px; color: var(--soft); }
#tip .row b { color: var(--ink); font-weight: 500; text-align: right; white-space: nowrap; }
#tip .row.hot { background: var(--panel); font-weight: 600; margin: 0 -5px; padding: 0 5px;
  border-radius: 2px; }
#tip .row span { display: inline-flex; align-items: center; gap: 7px; }
#tip .sw { width: 10px; height: 10px; flex: none; }
@media (max-width: 760px) {
  body { font-size: 16px; }
  main { padding: 28px 16px 48px; }
  h1 { font-size: 29px; } .subtitle { font-size: 17px; } h2 { font-size: 22px; margin-top: 44px; }
  .figures { grid-template-columns: 1fr 1fr; gap: 18px; } .figures dd { font-size: 26px; }
  .chart svg.wide { display: none; } .chart svg.narrow { display: block; }
  table { font-size: 13.5px; } th, td { padding-left: 12px; }
  pre { padding: 12px 14px; }
}
@media print { body { background: none; } figure { break-inside: avoid; }
.routes { break-inside: auto; } }
)css";

// Text reaches the page by textContent only, so nothing in the data can become markup.
const char kPageScript[] = R"js(
'use strict';
(() => {
  const tip = document.getElementById('tip');
  const el = (name, css, text) => {
    const node = document.createElement(name);
    if (css) node.className = css;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const row = (swatch, name, value, hot) => {
    const r = el('div', hot ? 'row hot' : 'row'), label = el('span');
    if (swatch) label.append(el('i', 'sw ' + swatch));
    label.append(name);
    r.append(label, el('b', '', value));
    return r;
  };
  const show = (event, nodes) => {
    tip.replaceChildren(...nodes);
    tip.hidden = false;
    const w = tip.offsetWidth, h = tip.offsetHeight, gap = 14;
    // Right of and below the pointer, or on the other side of it, but always inside the window.
    const place = (at, size, room) => {
      const last = room - size - 6;
      return Math.max(6, Math.min(at + gap > last ? at - gap - size : at + gap, last));
    };
    const x = place(event.clientX, w, innerWidth), y = place(event.clientY, h, innerHeight);
    tip.style.transform = `translate(${x}px,${y}px)`;
  };
  const hide = () => { tip.hidden = true; };
  const trim = (v, digits) => String(Number(v.toPrecision(digits)));
  const format = (v, style) => {
    if (style === 'percent') return (100 * v).toFixed(1) + '%';
    if (style === 'bytes') {
      const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
      let u = 0;
      for (; Math.abs(v) >= 1023.5 && u < 4; u++) v /= 1024;
      return trim(v, 4) + ' ' + units[u];
    }
    if (Number.isInteger(v) || Math.abs(v) >= 1000) return Math.round(v).toLocaleString('en-US');
    return Math.abs(v) < 1e-3 ? trim(v, 4) : v.toPrecision(5);
  };
  const data = figure => JSON.parse(figure.querySelector('script').textContent);

  for (const figure of document.querySelectorAll('figure.chart')) {
    if (!figure.querySelector('script')) continue;
    const chart = data(figure);
    for (const svg of figure.querySelectorAll('svg')) {
      const [px0, px1, x0, x1] = svg.dataset.x.split(' ').map(Number);
      const [py0, py1, y0, y1] = svg.dataset.y.split(' ').map(Number);
      const at = x => px0 + ((chart.log ? Math.log10(x) : x) - x0) / (x1 - x0) * (px1 - px0);
      const hover = svg.querySelector('.hover');
      const leave = () => { hover.replaceChildren(); hide(); };
      const svgNode = (name, attributes) => {
        const node = document.createElementNS(svg.namespaceURI, name);
        for (const key in attributes) node.setAttribute(key, attributes[key]);
        return node;
      };
      const nearest = (points, px) => {
        let lo = 0, hi = points.length - 1;
        while (lo < hi) {
          const mid = (lo + hi) >> 1;
          if (at(points[mid][0]) < px) lo = mid + 1; else hi = mid;
        }
        return lo > 0 && px - at(points[lo - 1][0]) < at(points[lo][0]) - px ? lo - 1 : lo;
      };
      const move = event => {
        const box = svg.getBoundingClientRect();
        const px = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
        const hits = chart.series.filter(s => s.points.length)
            .map(s => ({s, p: s.points[nearest(s.points, px)]}));
        if (!hits.length) return;
        const distance = hit => Math.abs(at(hit.p[0]) - px);
        const x = hits.reduce((a, b) => distance(b) < distance(a) ? b : a).p[0];
        // A series that has no point near this x (validation is rarer than training) is left out.
        const here = hits.filter(h => Math.abs(at(h.p[0]) - at(x)) < 12);
        hover.replaceChildren(svgNode('path', {class: 'guide', d: `M${at(x)} ${py1}V${py0}`}),
            ...here.map(h => svgNode('circle', {class: 'c' + h.s.color, r: 4, cx: at(h.p[0]),
              cy: py0 + (h.p[1] - y0) / (y1 - y0) * (py1 - py0)})));
        show(event, [el('div', 'head', (chart.x ? chart.x + ' ' : '') + format(x, chart.xStyle)),
          ...here.map(h => row('c' + h.s.color, h.s.name, format(h.p[1], chart.yStyle)))]);
      };
      svg.addEventListener('pointermove', move);
      svg.addEventListener('pointerdown', move);
      svg.addEventListener('pointerleave', leave);
    }
  }

  for (const bar of document.querySelectorAll('[data-tip]')) {
    const move = event => {
      const [head, text] = bar.dataset.tip.split('\n');
      show(event, [el('div', 'head', head), el('div', '', text)]);
    };
    bar.addEventListener('pointermove', move);
    bar.addEventListener('pointerdown', move);
    bar.addEventListener('pointerleave', hide);
  }

  for (const figure of document.querySelectorAll('figure.routes')) {
    const map = data(figure), count = map.layers.length;
    const name = l => (/^\d+$/.test(map.layers[l]) ? 'layer ' : '') + map.layers[l];
    let hot = null;
    const leave = () => { if (hot) hot.classList.remove('hot'); hot = null; hide(); };
    const move = event => {
      const token = event.target.closest('.t');
      if (!token) return leave();
      if (hot) hot.classList.remove('hot');
      hot = token;
      hot.classList.add('hot');
      const i = Number(token.dataset.i), box = token.querySelector('svg').getBoundingClientRect();
      const lane = event.clientY < box.top ? -1
          : Math.min(count - 1, Math.floor((event.clientY - box.top) * count / box.height));
      const routed = map.layers.map((_, l) => l).filter(l => map.routed[l]);
      const on = l => map.routed[l][i] === '1';
      const line = l => map.routed[l] === null ? row('dense', name(l), 'dense', l === lane)
          : row(on(l) ? 'on' : 'off', name(l), (on(l) ? 'attends' : 'bypasses') +
              (map.p[l][i] < 0 ? '' : ' · p ' + (map.p[l][i] / 1000).toFixed(3)), l === lane);
      // All layers if they fit on a small screen, else the one under the pointer.
      const shown = count <= 16 ? map.layers.map((_, l) => l) : lane >= 0 ? [lane] : [];
      show(event, [el('div', 'head', '\u201c' + token.firstChild.textContent + '\u201d'),
        row('', 'position', (map.first + i).toLocaleString('en-US')),
        row('', 'attends in', routed.filter(on).length + ' of ' + routed.length + ' routed layers'),
        ...shown.map(line)]);
    };
    const flow = figure.querySelector('.flow');
    flow.addEventListener('pointermove', move);
    flow.addEventListener('pointerdown', move);
    flow.addEventListener('pointerleave', leave);
  }
  addEventListener('scroll', hide, {passive: true});
})();
)js";

}  // namespace detour::report
