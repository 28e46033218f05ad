// ComfyUI's own front end in headless Chromium, for the scripts beside this file.
const fs = require('fs');
const os = require('os');
const path = require('path');
const { chromium } = require('playwright-core');

const SETTINGS = {
  'Comfy.TutorialCompleted': true,
  'Comfy.Workflow.ShowMissingNodesWarning': true,
  'Comfy.Workflow.ShowMissingModelsWarning': false, // it offers those that a graph names
  'Comfy.Minimap.Visible': false, // it would cover nodes on the picture
  'Comfy.VueNodes.Enabled': false,
  'LiteGraph.Canvas.MinFontSizeForLOD': 0, // text is drawn however far out
};

// `work(page, errors)` with the page open and no graph in it that anybody wants.
async function withPage(base, work, settings = {}) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'front-end-'));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
    viewport: { width: 1700, height: 950 },
    args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
  });
  try {
    const page = context.pages()[0] || (await context.newPage());
    const errors = [];
    page.on('pageerror', (error) => errors.push(String(error).slice(0, 300)));
    for (const [name, value] of Object.entries({ ...SETTINGS, ...settings })) {
      await fetch(`${base}/settings/${name}`, { method: 'POST', body: JSON.stringify(value) });
    }
    await page.route('**/*', (route) => {
      const url = new URL(route.request().url());
      const ours = url.hostname === '127.0.0.1' || ['data:', 'blob:'].includes(url.protocol);
      return ours ? route.continue() : route.abort();
    });
    await page.goto(base, { waitUntil: 'domcontentloaded', timeout: 180000 });
    await page.waitForFunction(() => window.app?.graph && window.app.canvas, null, { timeout: 240000 });
    await page.waitForTimeout(3000);
    await page.keyboard.press('Escape');
    await work(page, errors);
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

// Of later front ends the first button beside it sets how often.
const RUN = ['[data-testid="queue-button"] button', '.queue-button-group button', 'button[data-testid="queue-button"]']
  .map((place) => `${place}:has-text("Run")`).join(', ');

async function idle(page, base, seconds = 400) {
  for (let second = 0, still = 0; second < seconds && still < 3; second++) {
    await page.waitForTimeout(1000);
    const { exec_info } = await (await fetch(`${base}/prompt`)).json();
    still = exec_info.queue_remaining === 0 ? still + 1 : 0;
  }
}

module.exports = { withPage, idle, RUN };
