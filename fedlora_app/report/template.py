"""The report's page: its markup, style and script.

They stand in a Python module because Flower's app bundle carries no other file of their kind, and
the server writes a report at the end of every run.
"""

MACROS = """\
{% macro figure_table(table) %}
{% if table.rows %}
<p class="caption">{{ table.caption }}</p>
<div class="scroll"><table class="figures">
<thead><tr>{% for heading in table.headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}
<tr{% if row.best %} class="best"{% endif %}><th scope="row">{{ row.label }}</th>
{% for cell in row.cells %}<td>{% if cell %}<b>{{ cell.main }}</b><small>{{ cell.interval }}</small>\
<small>{{ cell.second }}</small>{% endif %}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}
{% endmacro %}
{% macro plain_table(table) %}
{% if table.caption %}<p class="caption">{{ table.caption }}</p>{% endif %}
<div class="scroll"><table>
<thead><tr>{% for heading in table.headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr>{% for cell in row %}<td>{% if cell.href is defined %}\
<a href="{{ cell.href }}">{{ cell.text }}</a>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>\
{% endfor %}</tbody></table></div>
{% endmacro %}
{% macro question_list(section) %}
{% if section.clients %}
<form class="filter" id="filter" hidden>
  <label>Show <select name="status"><option value="">all</option>\
<option value="passed">passed by every client</option>\
<option value="failed">failed by a client</option>\
<option value="unmeasured">not measured</option></select></label>
  <label>Client <select name="client"><option value="">any</option>\
{% for client in section.clients %}<option>{{ client }}</option>{% endfor %}</select></label>
  <label>Search <input type="search" name="text" placeholder="question or answer"></label>
  <output id="count"></output>
</form>
{% endif %}
<div{% if section.clients %} id="questions"{% endif %}>
{% for q in section.questions %}
<article class="{{ q.status }}">
  <h3><span class="mark">{{ q.mark }}</span> {{ q.text }}</h3>
  <div class="scroll"><table><thead><tr><th scope="col">client</th><th scope="col">\
{{ "its own answer" if section.clients else "right answer" }}</th>\
<th scope="col">what it said</th>{% if section.blames %}<th scope="col">due to</th>{% endif %}\
<th scope="col" class="number">log-likelihood</th>\
<th scope="col">most likely other answer</th><th scope="col" class="number">log-likelihood</th></tr></thead>
  <tbody>{% for a in q.answers %}<tr class="{{ a.status }}" data-client="{{ a.client }}">\
<th scope="row">{{ a.client }}</th><td>{{ a.gold }}</td><td>{{ a.said }}</td>\
{% if section.blames %}<td class="due">{{ a.failed }}</td>{% endif %}<td class="number">{{ a.own }}</td><td>{{ a.rival }}</td><td class="number">{{ a.other }}</td></tr>\
{% endfor %}</tbody></table></div>
</article>
{% endfor %}
</div>
{% endmacro %}
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{{ script_hash }}'">
{% if reload_seconds %}<meta http-equiv="refresh" content="{{ reload_seconds }}">{% endif %}
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
  <p class="kicker">{{ kicker }}</p>
  {% if reload_seconds %}<p class="kicker">The run is going on. Written at {{ written }}; this page reloads by itself every {{ reload_seconds }} seconds.</p>{% endif %}
  <h1>{{ verdict.headline }}</h1>
  <p class="lead">{{ verdict.sentence }}</p>
  {% if problems %}<ul class="problems">{% for p in problems %}<li>{{ p }}</li>{% endfor %}</ul>{% endif %}
  {{ figure_table(table) }}
  {% for caveat in verdict.caveats %}<p class="note">{{ caveat }}</p>{% endfor %}
  <dl class="facts">{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>\
{% endfor %}</dl>
</header>
<nav aria-label="Sections">{% for section in sections %}<a href="#{{ section.id }}">\
{{ section.title }}</a>{% endfor %}</nav>
<main>
{% for section in sections %}
<section id="{{ section.id }}">
  <h2>{{ section.title }}</h2>
  {% for paragraph in section.text %}<p>{{ paragraph }}</p>{% endfor %}
  {% if section.plots %}<div class="plots">{% for plot in section.plots %}
    <figure>{% if plot.svg %}{{ plot.svg }}{% else %}<p class="missing">{{ plot.missing }}</p>\
{% endif %}{% if plot.caption %}<figcaption>{{ plot.caption }}</figcaption>{% endif %}</figure>{% endfor %}
  </div>{% endif %}
  {% for table in section.tables %}{{ plain_table(table) }}{% endfor %}
  {% if section.questions %}{{ question_list(section) }}{% endif %}
  {% for label, text in section.code %}<p>{{ label }}</p><pre>{{ text }}</pre>{% endfor %}
  {% for label, text in section.details %}<details><summary>{{ label }}</summary>\
<pre>{{ text }}</pre></details>{% endfor %}
</section>
{% endfor %}
</main>
<footer>{{ footer }}</footer>
<script>{{ script }}</script>
</body>
</html>
"""

STYLE = """
:root { --paper: #ffffff; --ink: #24292f; --soft: #57606a; --line: #d0d7de; --panel: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --warn: #9a6700; --link: #0969da;
  --s0: #0969da; --s1: #cf222e; --s2: #1a7f37; --s3: #8250df; --s4: #bc4c00; --s5: #1b7c83;
  --s6: #bf3989; --s7: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9198a1;
  --line: #3d444d; --panel: #151b23; --good: #3fb950; --bad: #f85149; --warn: #d29922;
  --link: #58a6ff; --s0: #58a6ff; --s1: #ff7b72; --s2: #56d364; --s3: #bc8cff; --s4: #f0883e;
  --s5: #39c5cf; --s6: #f778ba; --s7: #9198a1; } }
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); scroll-behavior: smooth;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
body { max-width: 1180px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 5vw, 2.6rem); line-height: 1.15; margin: .2rem 0 .6rem; }
h2 { margin: 0 0 .6rem; font-size: 1.4rem; }
h3 { margin: 0 0 .4rem; font-size: 1rem; }
a { color: var(--link); }
.kicker, .note, footer, figcaption, .caption { color: var(--soft); }
.kicker { margin: 0; }
.lead { font-size: 1.15rem; max-width: 62rem; margin: .2rem 0 1rem; }
.note { margin: .3rem 0; font-size: .92rem; max-width: 62rem; }
.problems { border-left: 4px solid var(--warn); background: var(--panel); margin: 1rem 0;
  padding: .6rem .6rem .6rem 2rem; }
.missing { color: var(--soft); border: 1px dashed var(--line); border-radius: 6px; padding: 1rem;
  margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .6rem;
  margin: 1.2rem 0; }
.facts div { border-top: 2px solid var(--line); padding-top: .3rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .6rem 0; z-index: 1; }
section { padding: 1.4rem 0; border-bottom: 1px solid var(--line); scroll-margin-top: 4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 1.2rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: .88rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .4rem 0; }
.caption { font-size: .9rem; margin: .8rem 0 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { min-width: 4.5rem; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
.figures b { display: block; font-size: 1.1rem; font-weight: 600; }
.figures small { display: block; color: var(--soft); font-size: .78rem; white-space: nowrap; }
.figures .best th, .figures .best b { color: var(--good); font-weight: 700; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem;
  overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
summary { cursor: pointer; padding: .3rem 0; }
.filter { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center;
  margin: .6rem 0 1rem; }
.filter[hidden] { display: none; }
select, input { font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; padding: .25rem .4rem; max-width: 100%; }
article { border: 1px solid var(--line); border-left: 4px solid var(--good); border-radius: 6px;
  padding: .7rem .9rem; margin-bottom: .8rem; content-visibility: auto;
  contain-intrinsic-size: auto 170px; }
article.failed { border-left-color: var(--bad); }
article.unmeasured { border-left-color: var(--line); }
article[hidden] { display: none; }
article td { min-width: 9rem; }
article td.number, article td.due { min-width: 0; }
article tr.failed td:nth-child(3), .failed .mark { color: var(--bad); }
article tr.passed td:nth-child(3), .passed .mark { color: var(--good); }
.mark { font-size: .8rem; text-transform: uppercase; letter-spacing: .04em; }
footer { padding: 1rem 0; font-size: .85rem; }
@media (max-width: 520px) { body { padding: .8rem; } .lead { font-size: 1.02rem; }
  th, td { padding-right: .5rem; font-size: .85rem; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f4f4f4; }
  nav, .filter { display: none !important; } html { font-size: 11px; }
  article, figure, tr { break-inside: avoid; } article { content-visibility: visible; }
  section { padding: .8rem 0; } a { color: inherit; } }
"""

SCRIPT = """
(() => {
  const form = document.getElementById('filter');
  if (!form) return;
  const articles = [...document.querySelectorAll('#questions article')];
  const texts = articles.map((article) => article.textContent.toLowerCase());
  const count = document.getElementById('count');
  const apply = () => {
    const status = form.elements.status.value;
    const client = form.elements.client.value;
    const words = form.elements.text.value.toLowerCase().trim();
    let shown = 0;
    articles.forEach((article, i) => {
      const own = client && article.querySelector(`tr[data-client="${client}"]`);
      const rated = client ? own : article;
      const fits = rated && (!status || rated.classList.contains(status));
      article.hidden = !(fits && texts[i].includes(words));
      article.querySelectorAll('tbody tr').forEach((row) => {
        row.hidden = Boolean(client) && row.dataset.client !== client;
      });
      shown += !article.hidden;
    });
    count.textContent = `${shown} of ${articles.length} questions`;
  };
  form.hidden = false;
  form.addEventListener('input', apply);
  form.addEventListener('submit', (event) => event.preventDefault());
  apply();
})();
"""
