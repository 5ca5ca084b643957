"""Style sheet of the report page: light, dark, phone and print."""

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d2327;--soft:#5b656d;
--rule:#dfdcd4;--accent:#0b6b7f;--before:#9aa5ad;--warn:#8a4b00;--warn-paper:#fdf3e3;
--heat:#0b6b7f;--on-heat:#fff;
--c0:#0072b2;--c1:#d55e00;--c2:#00805c;--c3:#b0508a;--c4:#a87400;--c5:#3a8fc4;--c6:#6b4fb3;
--c7:#4d4d4d}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14181b;--card:#1b2024;--ink:#e8e6e1;
--soft:#a3adb4;--rule:#333b41;--accent:#4fc3d9;--before:#66737c;--warn:#f2c27a;
--warn-paper:#2b2318;--heat:#4fc3d9;--on-heat:#06232a;
--c0:#5ab4e8;--c1:#ff8f4d;--c2:#3fcf9f;--c3:#e69ac8;--c4:#f0c04a;--c5:#9bd3f5;--c6:#b6a1f2;
--c7:#c9c9c9}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main,footer{max-width:1040px;margin:0 auto;padding:0 20px}
header{padding-top:44px}
.over{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.08em;
text-transform:uppercase}
h1{margin:.2em 0 .5em;font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;letter-spacing:-.01em}
.headline{margin:0 0 1em;padding:.15em 0 .15em 1em;border-left:4px solid var(--accent);
font-size:clamp(1.1rem,2.4vw,1.35rem);line-height:1.45;max-width:46em}
.summary{max-width:46em;color:var(--soft)}
nav ul{display:flex;flex-wrap:wrap;gap:.3em 1.2em;margin:1.4em 0 0;padding:.7em 0;list-style:none;
border:solid var(--rule);border-width:1px 0;font-size:.9rem}
a{color:var(--accent);text-underline-offset:.2em}
section{margin:2.6em 0}
h2{margin:0 0 .2em;font-size:1.3rem;line-height:1.25}
h2+div,h2+ul{margin-top:.8em!important}
h2+p{margin:.2em 0 1em;color:var(--soft);max-width:46em}
h3{margin:0;font-size:1rem;line-height:1.35}
.grid{display:grid;gap:18px;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}
figure,.card{margin:0;padding:16px 18px;background:var(--card);border:1px solid var(--rule);
border-radius:10px;min-width:0}
figure{display:flex;flex-direction:column;gap:10px}
figcaption p{margin:.15em 0 0;color:var(--soft);font-size:.86rem;line-height:1.4}
.grid.single{max-width:511px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--ink);font-size:13px;font-family:inherit}
svg .value{font-variant-numeric:tabular-nums}
svg .soft{fill:var(--soft)}svg .small{font-size:11px}svg .row{font-size:12px}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}svg .start{text-anchor:start}
svg .axis{stroke:var(--soft);fill:none}svg .grid{stroke:var(--rule);fill:none}
svg .origin{stroke:var(--ink);stroke-width:1.2;fill:none}
svg .frame{fill:none;stroke:var(--rule)}
svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .bar.before{fill:var(--before)}svg .bar.after{fill:var(--accent)}
svg .bar.reference{fill:var(--card);stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3}
svg .whisker{stroke:var(--ink);stroke-width:1.6;fill:none}
svg .halo{stroke:var(--card);stroke-width:4;fill:none;stroke-linecap:square}
svg .mark{fill-opacity:.72;stroke:var(--card);stroke-width:.5}
svg .place{font-weight:650;paint-order:stroke;stroke:var(--card);stroke-width:4px;
stroke-linejoin:round}
svg .heat{fill:var(--heat)}svg .on{fill:var(--on-heat)}
svg .wave{stroke:var(--accent);stroke-width:.9;fill:none}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}
.s4{stroke:var(--c4)}.s5{stroke:var(--c5)}.s6{stroke:var(--c6)}.s7{stroke:var(--c7)}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}
.f4{fill:var(--c4)}.f5{fill:var(--c5)}.f6{fill:var(--c6)}.f7{fill:var(--c7)}
.legend{display:flex;flex-wrap:wrap;gap:.2em 1.1em;margin:0;padding:0;list-style:none;
font-size:.86rem}
.legend li{display:flex;align-items:center;gap:.45em}
.legend svg{width:26px;flex:none}.legend svg.key{width:13px}
section>.legend{margin:0 0 .9em}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));
gap:0 1.6em;margin:1.2em 0 0;font-size:.92rem;line-height:1.4}
.facts div{padding:.4em 0}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere}
.recording{display:flex;flex-direction:column;gap:10px}
.recording header{max-width:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.3em .6em;
align-items:baseline}
.recording h3{overflow-wrap:anywhere}
.chip{padding:.05em .6em;border:1px solid var(--rule);border-radius:1em;font-size:.8rem}
.chip.right{border-color:var(--accent);color:var(--accent)}
.chip.wrong{border-color:var(--warn);color:var(--warn)}
audio{width:100%;height:38px}
.mel{display:block;width:100%;height:86px;border-radius:4px}
.recording p{margin:0}.recording .label{color:var(--soft);font-size:.8rem}
.nearest{margin:0;padding:0;list-style:none;font-size:.9rem}
.nearest li{display:grid;grid-template-columns:3.4em 1fr;gap:.6em;padding:.35em 0;
border-top:1px solid var(--rule)}
.nearest .sim{font-variant-numeric:tabular-nums;color:var(--soft)}
.nearest .own{font-weight:600}
.options{display:flex;flex-wrap:wrap;gap:.3em .4em;margin:.2em 0 0;padding:0;list-style:none}
.options .chip{overflow-wrap:anywhere}
.answers{margin:0;padding:0;list-style:none;font-size:.9rem}
.answers li{padding:.4em 0;border-top:1px solid var(--rule)}
.said{display:flex;flex-wrap:wrap;gap:.2em .6em;align-items:baseline}
.stage{font-weight:600;overflow-wrap:anywhere}
.answer,.whole{overflow-wrap:anywhere}.whole{white-space:pre-wrap;color:var(--soft);
max-height:22em;overflow-y:auto}
summary{color:var(--accent);font-size:.8rem;cursor:pointer}
.own-mark{color:var(--accent);font-size:.8rem;font-weight:600;white-space:nowrap}
.grid+.scroll,.scroll+.scroll{margin-top:18px}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.86rem;
font-variant-numeric:tabular-nums}
caption{padding:10px 12px;text-align:left;color:var(--soft)}
caption span{display:block;max-width:min(100vw - 5rem,58rem)}
th,td{padding:7px 9px;text-align:left;border-top:1px solid var(--rule);vertical-align:top}
thead th{font-weight:600;white-space:nowrap}
tbody th{font-weight:500}th.name{min-width:9em;
overflow-wrap:anywhere;position:sticky;left:0;background:var(--card)}
td.num,th.num{text-align:right;white-space:nowrap}
td.wrap{min-width:9em;overflow-wrap:anywhere}td.notes{min-width:14em}
.limits{margin:0;padding:14px 18px 14px 34px;border-left:4px solid var(--warn);
background:var(--warn-paper);border-radius:0 10px 10px 0;max-width:50em}
.limits li{margin:.25em 0}
.empty{margin:0;color:var(--soft);font-style:italic}
footer{padding-bottom:40px;color:var(--soft);font-size:.86rem}
@media (max-width:480px){header,main,footer{padding-left:14px;padding-right:14px}
figure,.card{padding:12px 10px}}
@media print{body{font-size:11px;background:#fff}header{padding-top:0}nav,audio{display:none}
header,main,footer{max-width:none;padding:0}section{margin:1.4em 0}
figure,.card,.limits,tr{break-inside:avoid}h2{break-after:avoid}
.grid{grid-template-columns:1fr 1fr}.scroll{overflow:visible}th,td{padding:3px 5px}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
