/**
 * embed.js of embed-token-broker: from one tag to a talking avatar.
 *
 *     <script async src="/embed.js" data-agent="A78WKV4515" data-token-url="/avatar-token"></script>
 *
 * The frame is made when the visitor clicks and removed on close, because an avatar that is connected
 * and silent is billed like one that talks.  While it is open it is never loaded again.  Each option
 * is an attribute of the tag, too: `tokenUrl` is `data-token-url`.
 *
 * Nothing is made from text (markup, style, code), so the strictest Content-Security-Policy will do:
 * `script-src` and `connect-src` for where script and tokens come from, `frame-src` for the viewer.
 */

export {};

declare global {
  const EmbedBroker: EmbedBroker.Api;

  interface Window {
    /** There once the script has run; wait for the event `embed-broker:ready` or the tag's `load`. */
    readonly EmbedBroker?: EmbedBroker.Api;
  }

  /** Events of the document; none of them holds a token. */
  interface DocumentEventMap {
    /** The tag has been read, and what it draws is there. */
    "embed-broker:ready": CustomEvent<EmbedBroker.Event>;
    /** The frame has been put into the page. */
    "embed-broker:open": CustomEvent<EmbedBroker.Event>;
    /** The frame has been taken away. */
    "embed-broker:close": CustomEvent<EmbedBroker.Event>;
    /** The site's backend has handed out a token. */
    "embed-broker:token": CustomEvent<EmbedBroker.TokenEvent>;
    /** Something failed; `retrying` says that the script tries once more by itself. */
    "embed-broker:error": CustomEvent<EmbedBroker.ErrorEvent>;
  }

  namespace EmbedBroker {
    /** Where a token comes from. One of `token` and `tokenUrl` must be there. */
    interface TokenOptions {
      /** The agent's code: 1 to 64 of `A-Z a-z 0-9 _ -`. */
      agent: string;
      /**
       * A token that was minted with the page. Once it has expired, `tokenUrl` is asked if there is one;
       * without one its life counts from now, because the device's clock may be wrong.
       */
      token?: string;
      /**
       * A route of the site's backend, on this origin or https. It gets
       * `POST {"agent_id", "fingerprint"}` and answers as the broker does, or `{"token"}`.
       */
      tokenUrl?: string;
      /** Where the viewer is: an origin, https or localhost. Default: `https://www.bithuman.ai`. */
      embedOrigin?: string;
      /** Further origins, by blanks, to which the viewer redirects: their messages are heard, too. */
      viewerOrigins?: string;
    }

    interface MountOptions extends TokenOptions {
      /**
       * `button` (default): in the corner of the window, opens a panel above it; `dialog`: a button
       * here, opens a modal dialog; `inline`: the avatar itself stands here; `none`: draws nothing.
       */
      mode?: "button" | "dialog" | "inline" | "none";
      /** The text on the button. */
      label?: string;
      /** What the panel and its frame are called. */
      title?: string;
    }

    interface Widget {
      /** As if the visitor had clicked; does nothing while it is open. */
      open(): void;
      /** Takes the frame away, and with it the connection. */
      close(): void;
      /** Closes, and takes everything out of the page. */
      remove(): void;
    }

    interface Api {
      /** 32 hex digits, made once for a device and kept in `localStorage` (else until the page ends). */
      fingerprint(): string;
      /**
       * A token that has at least a minute left. Calls at the same time share one request; a passing
       * failure is retried once, after `Retry-After`; until then further calls fail at once.
       * Without options: those of the first tag. Rejects with a `Failure`.
       */
      getToken(options?: TokenOptions): Promise<string>;
      /** Put an avatar into an element; for the same element again it returns the same one. */
      mount(target: Element, options: MountOptions): Widget;
      /** Read a tag as if it had just loaded this script: for tags that load a copy of it. */
      start(tag: HTMLScriptElement): void;
      /** What visitors read. Replace it before `mount`; `{seconds}` is filled in. */
      readonly texts: Record<
        "label" | "title" | "close" | "connecting" | "busy" | "refused" | "expired" | "again",
        string
      >;
    }

    /**
     * `code`: `CONFIG` (an attribute is wrong), `NETWORK`, `NO_TOKEN` (the route answered something
     * else), `TOKEN_EXPIRED`, `FRAME_BLOCKED` (the page's `frame-src`), a code of the broker such as
     * `RATE_LIMITED`, or `HTTP_500` where the answer had none.
     */
    interface Failure extends Error {
      readonly code: string;
      /** Of the answer, where there was one. */
      readonly status?: number;
      /** Seconds; only where the same request may succeed later. */
      readonly retryAfter?: number;
    }

    interface Event {
      readonly agent: string;
    }

    interface TokenEvent extends Event {
      /** Names the visitor's session. */
      readonly session?: string;
      /** Unix time in milliseconds. */
      readonly expires: number;
    }

    interface ErrorEvent extends Pick<Failure, "code" | "status" | "retryAfter" | "message"> {
      /** Missing where the tag itself is wrong. */
      readonly agent?: string;
      readonly retrying: boolean;
    }
  }
}
