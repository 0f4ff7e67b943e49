"""The report page's style sheet: system fonts, both color schemes."""

CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f7f8fa; --ink: #1b1f27; --soft: #667085; --line: #e6e8ec;
  --resnet: #4c6fff; --attention: #f0872b; --feed: #1fa187; --depth: #8e63ce; --fixed: #9aa3b2; }
@media (prefers-color-scheme: dark) { :root { --ground: #11141a; --raised: #191d25; --ink: #e8eaef; --soft: #98a2b3;
  --line: #2a303b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55; -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 28px 96px; }
h1 { font-size: 40px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 12px; }
h2 { font-size: 24px; letter-spacing: -.01em; margin: 0 0 6px; }
h3 { font-size: 16px; margin: 32px 0 10px; }
section { margin-top: 72px; }
.eyebrow { color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; margin: 0 0 8px; }
.lead { font-size: 18px; color: var(--soft); max-width: 46em; margin: 0; }
.note { color: var(--soft); max-width: 50em; margin: 0 0 22px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 32px; }
.tiles div { background: var(--raised); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px; }
.tiles b { display: block; font-size: 32px; line-height: 1.2; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 14px; line-height: 1.4; display: block; margin-top: 4px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(232px, 1fr)); gap: 24px 20px; }
figure { margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.pair img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figcaption { font-size: 15px; line-height: 1.35; margin-top: 8px; }
figcaption small { display: block; color: var(--soft); font-size: 13px; margin-top: 3px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
table.narrow { width: auto; min-width: 50%; }
th { font-weight: 500; color: var(--soft); font-size: 13px; white-space: nowrap; }
th, td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
.name { text-align: left; padding-left: 0; }
.total td { font-weight: 600; border-bottom: 0; }
td small { color: var(--soft); }
.mark { color: var(--feed); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.bar { display: inline-block; width: 84px; height: 6px; border-radius: 3px; background: var(--line); margin-right: 10px;
  vertical-align: middle; overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; color: var(--soft); font-size: 14px; margin: 0 0 14px; }
.stack { display: grid; grid-template-columns: 130px 1fr 60px; gap: 12px; align-items: center; margin: 7px 0; font-size: 15px; }
.stack > div { display: flex; gap: 2px; height: 20px; border-radius: 5px; overflow: hidden; background: var(--line); }
.stack > div i { display: block; height: 100%; }
.stack small { color: var(--soft); text-align: right; font-variant-numeric: tabular-nums; }
.stack:last-child { margin-top: 14px; padding-top: 14px; border-top: 1px solid var(--line); }
.strip { display: grid; grid-template-columns: 130px 1fr; gap: 12px; align-items: center; margin: 10px 0; font-size: 15px; }
.strip small { display: block; color: var(--soft); margin-left: 17px; font-variant-numeric: tabular-nums; }
.strip svg { width: 100%; height: 44px; display: block; border-radius: 5px; }
.strip .all { opacity: .16; }
.strip rect { stroke: var(--ground); stroke-width: 1.2px; vector-effect: non-scaling-stroke; }
g.resnet { fill: var(--resnet); } g.attention { fill: var(--attention); } g.feed_forward { fill: var(--feed); }
g.depth { fill: var(--depth); } g.fixed { fill: var(--fixed); }
.dot.resnet { background: var(--resnet); } .dot.attention { background: var(--attention); }
.dot.feed_forward { background: var(--feed); } .dot.depth { background: var(--depth); } .dot.fixed { background: var(--fixed); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 32px 28px; margin-top: 36px; }
.plots figure > svg { width: 100%; height: auto; display: block; }
.plots line { stroke: var(--ink); stroke-width: 1.4; } .plots .grid { stroke: var(--line); stroke-width: 1; }
.plots .full { fill: var(--ink); stroke: var(--ink); stroke-width: 1.6; }
.plots .hollow { fill: var(--ground); stroke: var(--ink); stroke-width: 1.6; } .plots text { fill: var(--soft); font-size: 12px; }
.plots text.x { text-anchor: middle; } .plots text.y { text-anchor: end; }
.shapes span { display: inline-block; margin-right: 14px; white-space: nowrap; }
.shapes svg { width: 13px; height: 13px; margin-right: 4px; vertical-align: -2px; }
.axis { margin-top: -4px; }
.axis > div { display: flex; }
.axis > div span { color: var(--soft); font-size: 12px; border-top: 2px solid var(--line); margin: 0; padding-top: 4px; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; text-align: center; box-shadow: inset 1px 0 var(--ground), inset -1px 0 var(--ground); }
h4 { font-size: 13px; font-weight: 500; color: var(--soft); margin: 16px 0 4px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 20px; }
.card { border: 1px solid var(--line); border-top: 4px solid; border-radius: 10px; padding: 16px 18px 18px; min-width: 0;
  break-inside: avoid; font-size: 15px; }
.card h3 { margin: 0 0 8px; } .card p, .card ul { margin: 0; } .card ul { padding: 0; list-style: none; }
.card small { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.card .figures { display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--soft); font-size: 14px; }
.card .figures b { color: var(--ink); font-size: 20px; font-variant-numeric: tabular-nums; }
.kept li { display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; }
.kept li > span:last-child { white-space: nowrap; }
.words span { white-space: nowrap; } .words, .prompts { overflow-wrap: anywhere; }
.prompts li { margin: 3px 0; line-height: 1.35; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 6px; }
.thumbs img { width: 100%; max-width: 128px; aspect-ratio: 1; object-fit: contain; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
.wrapped td.name { white-space: normal; min-width: 12em; } .hard { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
td.name b { font-weight: 500; } .changes { display: block; white-space: normal; min-width: 16em; line-height: 1.4; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 32px 18px 64px; } h1 { font-size: 30px; }
  .stack { grid-template-columns: 84px 1fr 44px; } .strip { grid-template-columns: 84px 1fr; } }
@media print { section { break-inside: avoid; } }
"""
