// What a page may write, and what the types must refuse.

async function page(target: HTMLElement): Promise<void> {
  const widget = EmbedBroker.mount(target, { agent: "A78WKV4515", tokenUrl: "/avatar-token", mode: "inline" });
  widget.open();
  widget.close();
  widget.remove();
  const token: string = await EmbedBroker.getToken({ agent: "A78WKV4515", tokenUrl: "/avatar-token" });
  const again: string = await EmbedBroker.getToken();
  const device: string = EmbedBroker.fingerprint();
  EmbedBroker.texts.label = `${token.length + again.length + device.length}`;
  document.addEventListener("embed-broker:token", ({ detail }) => {
    const expires: number = detail.expires;
    const session: string | undefined = detail.session;
    console.log(detail.agent, session, expires);
  });
  document.addEventListener("embed-broker:error", ({ detail }) => {
    if (detail.retrying && detail.retryAfter) console.log(detail.code, detail.status, detail.message);
  });
  window.EmbedBroker?.start(document.createElement("script"));

  // @ts-expect-error no such mode
  EmbedBroker.mount(target, { agent: "A", tokenUrl: "/t", mode: "popup" });
  // @ts-expect-error an agent is required
  EmbedBroker.mount(target, { tokenUrl: "/t" });
  // @ts-expect-error an option by its attribute's name
  EmbedBroker.mount(target, { agent: "A", "data-token-url": "/t" });
  // @ts-expect-error no such text
  EmbedBroker.texts.lable = "";
  // @ts-expect-error no event tells the token itself
  document.addEventListener("embed-broker:token", ({ detail }) => console.log(detail.token));
}

void page;
