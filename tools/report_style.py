"""What the report looks like, and the few lines of script that sort its tables."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<main>
{body}
</main>
<script>{sort}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #1c2733; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px; }
header, section { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; }
header, section { padding: 20px 24px; margin-bottom: 18px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 14px; }
h2 { font-size: 19px; line-height: 1.3; margin: 0 0 14px; text-wrap: balance; }
h3 { font-size: 15px; line-height: 1.35; margin: 18px 0 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: #5b6875; }
dd { margin: 0; overflow-wrap: anywhere; }
.plot { width: 100%; min-width: 0; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 24px; }
.pair > div { min-width: 0; display: grid; grid-row: span 4; grid-template-rows: subgrid; }
.reading { color: #5b6875; font-size: 13.5px; margin: 6px 0 16px; max-width: 90ch; }
.wide { overflow-x: auto; margin: 12px 0 4px; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #e6e9ed; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072b2; }
th button::after { content: "\\2195"; color: #a8b1bb; font-weight: 400; padding-left: 4px; }
th[aria-sort="ascending"] button::after { content: "\\2191"; color: #0072b2; }
th[aria-sort="descending"] button::after { content: "\\2193"; color: #0072b2; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }
article { border: 1px solid #e6e9ed; border-radius: 6px; padding: 12px; min-width: 0; }
article h3 { margin: 0 0 8px; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; }
.triple img { width: 100%; image-rendering: pixelated; border-radius: 3px; display: block; }
article ul { list-style: none; margin: 8px 0 0; padding: 0; font-size: 13px; }
li.fooled b { color: #b2182b; }
li.right b { color: #00694a; }
@media (max-width: 760px) {
  main { padding: 8px; }
  header, section { padding: 14px 12px; }
  .pair { grid-template-columns: minmax(0, 1fr); }
  .pair > div { display: block; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: 8px; }
  h1 { font-size: 21px; }
  h2 { font-size: 17px; }
}
"""

SORT = """
for (const head of document.querySelectorAll('th')) {
  head.querySelector('button').addEventListener('click', () => {
    const row = head.parentElement, body = row.closest('table').tBodies[0];
    const column = [...row.children].indexOf(head);
    const up = head.getAttribute('aria-sort') === 'descending';
    const key = tr => { const td = tr.children[column]; return td.dataset.value ?? td.textContent; };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)], [m, n] = [Number(x), Number(y)];
      return Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n;
    };
    const rows = [...body.rows].sort((a, b) => up ? compare(a, b) : compare(b, a));
    for (const other of row.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    body.append(...rows);
  });
}
"""
