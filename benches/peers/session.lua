-- Who has this cookie? What one writes for nginx: the hash of the cookie is a key in Redis, and what is found there is
-- a header for the backend.
--
-- It reads the records that Cloakroom wrote, under Cloakroom's key, so that both look for the same, but does not
-- understand them: the header has a fixed text. Nothing is checked, touched or expired here.
local ffi = require "ffi"
local redis = require "nginx.redis"

ffi.cdef [[ unsigned char *SHA256(const unsigned char *data, size_t length, unsigned char *digest); ]]
local digest = ffi.new("unsigned char[32]")

local to_standard = { ["-"] = "+", ["_"] = "/" }
local to_url = { ["+"] = "-", ["/"] = "_" }

local session = {}

-- `<prefix>s:{<bucket>}:<base64url of the first 24 bytes of SHA-256 of the secret>`
local function key_of(cookie)
    local bucket, secret = string.sub(cookie, 1, 2), string.sub(cookie, 3)
    local bytes = ngx.decode_base64((string.gsub(secret, "[-_]", to_standard)) .. "=")
    if not bytes then return nil end
    ffi.C.SHA256(bytes, #bytes, digest)
    local hash = string.gsub(ngx.encode_base64(ffi.string(digest, 24)), "[+/]", to_url)
    return "cloakroom:s:{" .. bucket .. "}:" .. hash
end

local function find(port, key)
    local client = redis:new()
    client:set_timeout(1000)
    local connected, problem = client:connect("127.0.0.1", tonumber(port))
    if not connected then
        ngx.log(ngx.ERR, problem)
        return ngx.exit(503)
    end
    local record = client:get(key)
    client:set_keepalive(60000, 512)
    return record ~= ngx.null and record or nil
end

local function cookie_key()
    local cookie = ngx.var.cookie_session
    local key = cookie and key_of(cookie)
    if not key then ngx.exit(401) end
    return key
end

function session.user(port)
    if not find(port, cookie_key()) then return ngx.exit(401) end
    return "somebody"
end

function session.cached_user(port, known)
    local key = cookie_key()
    local user = known:get(key)
    if not user then
        if not find(port, key) then return ngx.exit(401) end
        user = "somebody"
        known:set(key, user, 1)
    end
    return user
end

return session
