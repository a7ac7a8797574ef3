"""The page's style sheet. Both themes are sets of variables; the plots use the same ones."""

from __future__ import annotations

__all__ = ["STYLE"]

_LIGHT = (
    "--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--muted:#5a6472;--line:#dfe3e8;--accent:#2264a8;--second:#b8500f;"
    "--good:#18794e;--bad:#b3261e;--warn:#8a5a00"
)
_DARK = (
    "--paper:#14171b;--card:#1c2127;--ink:#e6e9ed;--muted:#9aa5b2;--line:#323a43;--accent:#6cacee;--second:#f0a066;"
    "--good:#4cc38a;--bad:#ff8278;--warn:#e5b454"
)

STYLE = f"""
:root{{color-scheme:light;{_LIGHT}}}
:root[data-theme=dark]{{color-scheme:dark;{_DARK}}}
@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
main,header,footer{{max-width:1040px;margin:0 auto;padding:0 24px}}
header{{padding-top:40px}}
footer{{padding:24px 24px 48px;color:var(--muted);font-size:13px}}
h1{{font-size:30px;line-height:1.2;margin:2px 0 10px;font-weight:650;letter-spacing:-.01em}}
h2{{font-size:20px;line-height:1.3;margin:48px 0 4px;font-weight:650}}
h3{{font-size:15px;margin:0 0 2px;font-weight:600}}
p{{margin:4px 0 12px;max-width:84ch}}
.over{{color:var(--muted);font-size:13px;margin:0}}
.lead{{font-size:18px;margin:12px 0 0}}
.remark,figcaption{{color:var(--muted);font-size:14px}}
.verdict{{display:inline-block;font-size:13px;font-weight:650;line-height:1;padding:5px 9px;border-radius:5px;
color:var(--tone);border:1.5px solid var(--tone);white-space:nowrap}}
.pass{{--tone:var(--good)}}.fail{{--tone:var(--bad)}}.inconclusive{{--tone:var(--warn)}}.skipped{{--tone:var(--muted)}}
header .verdict{{font-size:15px;padding:7px 12px;background:var(--tone);color:var(--paper)}}
.checks{{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:16px;margin-top:28px}}
.check{{background:var(--card);border-top:3px solid var(--tone);border-radius:4px;padding:16px 18px}}
.check header,.check .top{{display:flex;justify-content:space-between;align-items:center;gap:10px;margin-bottom:10px}}
.check p{{font-size:14px;margin:0 0 8px}}
.check p:last-child{{margin:0;color:var(--muted)}}
.figures{{margin:28px 0 0;padding:0;display:grid;
grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:20px 24px}}
.figures div{{border-left:2px solid var(--line);padding-left:14px}}
.figures dt{{color:var(--muted);font-size:13px}}
.figures dd{{margin:0;font-size:14px;color:var(--muted)}}
.figures dd.value{{font-size:24px;line-height:1.25;color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:28px 36px;margin-top:16px}}
figure{{margin:0;min-width:0}}
figure svg{{display:block;width:100%;height:auto;max-width:560px;margin:6px 0 4px}}
figure.broad svg{{max-width:none}}
.scroll{{overflow-x:auto;margin:8px 0}}
table{{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}}
th{{color:var(--muted);font-weight:500;font-size:13px;white-space:nowrap}}
td.number,th.number{{text-align:right;white-space:nowrap;overflow-wrap:normal}}
td{{overflow-wrap:normal}}
td.name,td:last-child{{overflow-wrap:anywhere}}
td.name{{min-width:150px}}
td.name.short{{min-width:0;white-space:nowrap}}
td:last-child:not(.number){{min-width:120px}}
code,pre{{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
pre{{background:var(--card);padding:12px 14px;border-radius:4px;white-space:pre-wrap;margin:8px 0 16px}}
details{{border-top:1px solid var(--line)}}
details:last-of-type{{border-bottom:1px solid var(--line)}}
summary{{cursor:pointer;padding:9px 0;font-size:15px}}
summary span{{color:var(--muted);font-size:14px;margin-left:10px}}
ul{{padding-left:20px;margin:8px 0;max-width:80ch}}
@media (max-width:640px){{
main,header,footer{{padding-left:16px;padding-right:16px}}
header{{padding-top:24px}}
h1{{font-size:24px}}
h2{{margin-top:36px}}
.lead{{font-size:16px}}
.figures{{grid-template-columns:1fr 1fr}}
.extra{{display:none}}
th,td{{padding-right:8px}}
}}
@media print{{details{{break-inside:avoid}}.check,figure{{break-inside:avoid}}}}
"""
