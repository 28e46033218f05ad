// node templates.js PORT NAME …: opens each template of this pack by a click in ComfyUI's own template
// browser. Prints, as JSON, the types of the nodes on the canvas for each, and what the page complained of.
const { withPage } = require('./browser.js');

const [port, ...names] = process.argv.slice(2);

withPage(`http://127.0.0.1:${port}`, async (page, errors) => {
  const opened = {};
  const failed = [];
  page.on('response', (answer) => {
    if (answer.url().includes('workflow_templates') && answer.status() >= 400) failed.push(answer.url());
  });
  for (const name of names) {
    await page.evaluate(() => window.app.graph.clear());
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'));
    await page.getByText('iteris-lora', { exact: true }).first().click();
    await page.locator(`[data-testid="template-workflow-${name}"]`).click();
    await page.waitForTimeout(2500);
    opened[name] = await page.evaluate(() => window.app.graph._nodes.map(({ type }) => type).sort());
  }
  const toasts = await page.locator('.p-toast-message').allInnerTexts();
  console.log(JSON.stringify({ opened, failed, toasts, errors }));
}).catch((error) => {
  console.error(error);
  process.exit(1);
});
