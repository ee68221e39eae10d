"""The report page's style sheet: colours by name, once for light and once for dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5c6670; --paper: #fbfbf9;
  --line: #dcdfe2; --card: #fff; --plain: #3b6ea5; --out: #3d8b63; --dropped: #c98a1b;
  --dead: #b8433f; --mask: #3b6ea5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a2ac; --paper: #15181b;
  --line: #31373d; --card: #1c2024; --plain: #7fb0e0; --out: #6cc096; --dropped: #e0b050;
  --dead: #e07f7b; --mask: #7fb0e0; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
code { font-size: .9em; word-break: break-all; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; } .card data { display: block; font-size: 1.35rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--soft); }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
.base { stroke: var(--line); } .plain { fill: var(--plain); } .out { fill: var(--out); }
.dropped { fill: var(--dropped); } .dead { fill: var(--dead); }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin: 0 .4em 0 1em;
  background: currentColor; }
.key.out { color: var(--out); } .key.dropped { color: var(--dropped); }
.key.dead { color: var(--dead); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.65 ui-monospace, monospace;
  unicode-bidi: isolate; margin: .4rem 0 1.2rem; }
.mask { display: inline-block; height: 1.05em; vertical-align: text-bottom; border-radius: 3px;
  background: var(--mask); opacity: .75; margin: 0 1px; }
.border { display: block; border-top: 2px dashed var(--dead); margin: .5em 0; }
.prompt { color: var(--soft); font-style: italic; }
.end, .pad { color: var(--soft); font-size: .85em; }
"""
