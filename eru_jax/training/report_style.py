"""The style sheet of `report.html`: light and dark, desktop and phone, no fonts to load."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f6f8; --ink: #1d2129; --quiet: #5a6270; --faint: #dcdfe5;
  --accent: #3a5bd0; --right: #1a7f37; --wrong: #cf222e; --on-mark: #ffffff;
  --series-0: #3a5bd0; --series-1: #c2410c; --series-2: #0f766e; --series-3: #a21caf;
  --series-4: #8a6100; --series-5: #57606a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --panel: #1d2026; --ink: #e8eaee; --quiet: #a3abb8; --faint: #383d47;
    --accent: #8fa8ff; --right: #4ac26b; --wrong: #ff7b72; --on-mark: #14161a;
    --series-0: #8fa8ff; --series-1: #ff9c5a; --series-2: #45d0c0; --series-3: #e48bf0;
    --series-4: #e2b93b; --series-5: #a3abb8;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem; max-width: 70rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word;
}
h1, h2, h3 { line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 5vw, 2.4rem); letter-spacing: -0.02em; margin: 0 0 1rem; }
h2 {
  font-size: 1.45rem; margin: 3rem 0 1rem; padding-top: 1rem;
  border-top: 1px solid var(--faint);
}
h3 { font-size: 1.15rem; margin: 2.5rem 0 0.3rem; }
section:first-child h2 { margin-top: 1.5rem; }
p + h3 { margin-top: 1.5rem; }
p { max-width: 46rem; margin: 0 0 0.8rem; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.caveat, .meaning, small, footer, figcaption { color: var(--quiet); }
.caveat { border-left: 3px solid var(--faint); padding-left: 0.8rem; font-size: 0.92rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.4rem 1.4rem; margin-top: 1.2rem; }
footer { margin-top: 3rem; font-size: 0.85rem; }

.key { font-weight: 600; white-space: nowrap; }
.key.right { color: var(--right); }
.key.wrong { color: var(--wrong); }
.rates {
  display: flex; flex-wrap: wrap; gap: 0.5rem 1.75rem; align-items: baseline;
  list-style: none; margin: 0.4rem 0 1rem; padding: 0; font-size: 0.9rem; color: var(--quiet);
}
.rates b { color: var(--ink); font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.bar { display: block; width: 8.5rem; height: 5px; border-radius: 3px; background: var(--faint); }
.bar > i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }

table { border-collapse: collapse; }
th { font-weight: 500; text-align: left; }
.gallery { width: 100%; }
.gallery caption {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
}
.gallery thead th {
  position: sticky; top: 0; z-index: 1; background: var(--paper); color: var(--quiet);
  font-size: 0.82rem; line-height: 1.25; text-align: center; vertical-align: bottom;
  padding: 0.5rem 0.4rem;
}
.gallery thead th:first-child { text-align: left; padding-left: 0; }
.gallery tbody tr { border-top: 1px solid var(--faint); }
.gallery tbody th { padding: 0.6rem 1rem 0.6rem 0; vertical-align: middle; }
.gallery td { width: 8.6rem; padding: 0.5rem 0.3rem; text-align: center; vertical-align: middle; }
.anchor { display: block; margin-top: 0.15rem; font-weight: 600; }
.anchor > span { font-weight: 400; color: var(--quiet); }
.picture { position: relative; display: inline-block; vertical-align: top; max-width: 100%; }
.picture img {
  display: block; width: 7.6rem; max-width: 100%; height: auto; border-radius: 8px;
  border: 3px solid var(--faint); padding: 3px;
  background: #ffffff padding-box;
}
.target .picture img { border: 3px dashed var(--faint); }
.right .picture img { border-color: var(--right); }
.wrong .picture img { border-color: var(--wrong); }
.none { color: var(--quiet); }
.mark {
  position: absolute; right: -0.35rem; bottom: -0.35rem; width: 1.35rem; height: 1.35rem;
  border-radius: 50%; border: 2px solid var(--paper); color: var(--on-mark);
  font: 700 0.75rem/1.1rem system-ui, sans-serif; text-align: center;
}
.right .mark { background: var(--right); }
.wrong .mark { background: var(--wrong); }

details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); font-weight: 500; padding: 0.3rem 0; }
pre {
  overflow: auto; max-height: 36rem; padding: 1rem; border-radius: 8px; background: var(--panel);
  font: 0.82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; tab-size: 2;
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure {
  margin: 0; padding: 1rem; border-radius: 10px; background: var(--panel); max-width: 34rem;
}
figcaption { font-size: 0.9rem; margin-bottom: 0.5rem; font-weight: 500; }
figcaption small { display: block; font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; }
.wide { max-width: none; }
.wide > div { display: flex; flex-wrap: wrap; gap: 0.6rem 1.5rem; align-items: center; }
.wide svg { flex: 1 1 17rem; width: auto; }
@media (min-width: 62rem) {
  .wide { grid-column: span 2; }
  .wide .legend { flex-direction: column; gap: 0.5rem; }
}
.legend {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; list-style: none; margin: 0; padding: 0;
  font-size: 0.82rem;
}
.scroll { overflow-x: auto; }
.scroll caption {
  text-align: left; color: var(--quiet); padding-bottom: 0.5rem; font-size: 0.9rem;
}
.accuracy, .plain { width: 100%; }
.accuracy small { display: block; font-weight: 400; font-size: 0.82rem; line-height: 1.35; }
.accuracy td, .plain td { font-variant-numeric: tabular-nums; }
.accuracy th, .accuracy td, .plain th, .plain td {
  padding: 0.55rem 1.2rem 0.55rem 0; border-top: 1px solid var(--faint); vertical-align: top;
}
.accuracy td { white-space: nowrap; }
.accuracy tbody th { min-width: 14rem; }
.accuracy thead th { border-top: 0; color: var(--quiet); font-size: 0.9rem; }
.pairs {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem 3rem;
}
.plain th, .plain td { padding-block: 0.3rem; font-weight: 400; font-size: 0.92rem; }
.plain td { text-align: right; padding-right: 0; }

@media (max-width: 56rem) {
  body { padding: 1.5rem 1rem; }
  .gallery, .gallery tbody { display: block; }
  .gallery thead { display: none; }
  .gallery tbody tr {
    display: grid; grid-template-columns: repeat(auto-fill, minmax(max(4.6rem, 21%), 1fr));
    gap: 0.5rem 0.6rem; padding: 0.9rem 0;
  }
  .gallery tbody th { grid-column: 1 / -2; padding: 0; align-self: center; }
  .gallery td { width: auto; padding: 0; }
  .gallery td::after {
    content: attr(data-label); display: block; margin-top: 0.3rem;
    font-size: 0.75rem; line-height: 1.2; color: var(--quiet);
  }
  .bar { width: 5.5rem; }
  .accuracy tbody th { min-width: 6.5rem; }
  .accuracy th small { display: none; }
  .accuracy td { white-space: normal; }
  .accuracy th, .accuracy td { padding-right: 0.8rem; }
  .rates { gap: 0.5rem 1.1rem; }
}
@media print {
  .gallery tr, figure { break-inside: avoid; }
  .gallery thead th { position: static; }
  nav { display: none; }
}
"""
