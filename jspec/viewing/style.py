"""How a page of a run looks, in light and in dark."""

STYLE = """
:root { color-scheme: light dark; --fg: #1c2126; --dim: #5b6570; --bg: #fbfbfa; --card: #ffffff;
  --rule: #dfe3e6; --c0: #1f6fb2; --c1: #c4571b; --c2: #2e8b57; --c3: #8a5bb5; --c4: #b58900;
  --c5: #c2477f; --c6: #4d7c8a; --c7: #7a6a53;
  --c8: #9aa324; --c9: #d0a98f; --c10: #3b4a9b; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e7ea; --dim: #9aa4ae; --bg: #14171a;
  --card: #1c2024; --rule: #343a40; --c0: #62a8e5; --c1: #eb8a50; --c2: #62c08c; --c3: #b791de;
  --c4: #d9b342; --c5: #e67fb0; --c6: #82b4c2; --c7: #b5a48a; --c8: #c3cc5a; --c9: #e8c8b4;
  --c10: #8f9be8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 8px; }
p { margin: 0 0 12px; color: var(--dim); }
.tiles { display: grid; gap: 10px; margin: 18px 0;
  grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); }
.tiles div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tiles div { padding: 10px 14px; }
.tiles b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--dim); font-size: 13px; }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; padding: 12px 14px 8px; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
@media (max-width: 600px) { svg text { font-size: 16px; } }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .band { fill: var(--c0); opacity: 0.16; stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 4px; font-size: 13px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 5px; }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 10px;
  border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
thead th { border-top: 0; color: var(--dim); font-weight: 600; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 150px; max-width: 460px; }
details { margin-top: 32px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px; font-size: 13px; }
"""
