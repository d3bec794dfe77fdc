"""Opens a page of `detour` in headless Chromium and moves a pointer over all that reacts to one.

Fails on any JavaScript or security-policy error, on a missing tooltip and on a page wider than its
window.

usage: page_browser_test.py PAGE.html     exit code 0: fine; 1: not; 77: no Chromium
"""
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile

# Runs inside the page. The report is left in an attribute, where --dump-dom shows it.
PROBE = """
<script>
(() => {
  const problems = [], seen = [];
  addEventListener('error', e => problems.push(e.message));
  const tip = document.getElementById('tip');
  const point = (target, x, y) => target.dispatchEvent(
      new PointerEvent('pointermove', {bubbles: true, clientX: x, clientY: y}));
  const visit = (target, kind) => {
    const box = target.getBoundingClientRect();
    if (!box.width) return;
    for (const f of [0.02, 0.3, 0.6, 0.98]) {
      point(target, box.left + f * box.width, box.top + f * box.height);
      if (tip.hidden || !tip.textContent || /NaN|undefined|null/.test(tip.textContent)) {
        problems.push(kind + ' tooltip: ' + (tip.hidden ? 'hidden' : tip.textContent));
      }
    }
    if (!seen.some(s => s.startsWith(kind))) seen.push(kind + ': ' + tip.textContent);
    target.dispatchEvent(new PointerEvent('pointerleave', {bubbles: false}));
  };
  for (const svg of document.querySelectorAll('svg[data-x]')) visit(svg, 'line');
  for (const bar of document.querySelectorAll('[data-tip]')) visit(bar, 'bar');
  for (const token of document.querySelectorAll('.t')) visit(token, 'token');
  const wide = document.documentElement.scrollWidth - innerWidth;
  if (wide > 0) problems.push('page is ' + wide + ' px wider than its window');
  document.body.setAttribute('data-report', JSON.stringify({problems, seen, width: innerWidth}));
})();
</script>
"""


def run(browser, url, width, profile):
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--disable-dev-shm-usage", f"--user-data-dir={profile}",
               f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def main(page):
    names = ["chromium", "chromium-browser", "google-chrome"]
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        print("skipped: no Chromium")
        return 77
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        profile = os.path.join(folder, "profile")
        # Some systems ship only a launcher that asks for another package.
        if "<html" not in run(browser, "about:blank", 800, profile).stdout:
            print(f"skipped: {browser} does not start")
            return 77
        probed = os.path.join(folder, "page.html")
        with open(page, encoding="utf-8") as source, open(probed, "w", encoding="utf-8") as target:
            target.write(source.read().replace("</body>", PROBE + "</body>"))
        for width in (1280, 500):
            result = run(browser, f"file://{probed}", width, profile)
            console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
            report = re.search(r'data-report="([^"]*)"', result.stdout)
            report = html.unescape(report.group(1)) if report else "the script did not finish"
            fine = not console and '"problems":[]' in report
            failed |= not fine
            print(f"{width} px: {'fine' if fine else 'FAILED'}")
            print("\n".join("  " + line for line in [report[:1500]] + console))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(os.path.abspath(sys.argv[1])))
