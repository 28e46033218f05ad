// node page.js PAGE.html
// Opens a page of scores in headless Chromium as a phone and as a desktop, light and dark, sorts its
// first table with the keyboard alone, and prints as JSON what came of it.
const { chromium } = require('playwright-core');

async function look(browser, width, colorScheme) {
  const page = await browser.newPage({ viewport: { width, height: 850 }, colorScheme });
  const asked = [];
  const errors = [];
  page.on('request', (request) => asked.push(request.url()));
  page.on('pageerror', (error) => errors.push(String(error)));
  await page.goto(`file://${process.argv[2]}`);
  for (let stop = 0; stop < 3; stop++) await page.keyboard.press('Tab'); // table, method, first column
  const orders = [];
  for (let press = 0; press < 2; press++) {
    await page.keyboard.press('Enter');
    orders.push(
      await page.evaluate(() => ({
        column: document.activeElement.textContent,
        said: document.querySelector('[role=status]').textContent,
        sorts: document.activeElement.closest('th').ariaSort,
        rows: [...document.querySelector('.scores').tBodies[0].rows].map((r) => r.cells[0].textContent),
      })),
    );
  }
  const found = await page.evaluate(() => ({
    wider: document.documentElement.scrollWidth > innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    pictures: [...document.images].filter((i) => i.naturalWidth > 0 && i.alt).length,
  }));
  await page.close();
  return { ...found, errors, orders, asked: asked.filter((url) => !/^(data|file):/.test(url)) };
}

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] });
  const looks = [];
  for (const scheme of ['light', 'dark'])
    for (const width of [390, 1280]) looks.push(await look(browser, width, scheme));
  console.log(JSON.stringify(looks));
  await browser.close();
})();
