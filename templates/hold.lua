-- lua.hold SECONDS: a request waits here while the engine is away, and goes on as soon as it is
-- back. Once the time is over, or the door itself ends, haproxy.cfg refuses it.

local STEP_MS = 20
local waited, longest = 0, 0.0

-- Up to HAProxy 3.0 a boolean comes as a number, and in Lua 0 is true.
local function is(value)
    return value == true or value == 1
end

local function clock()
    local now = core.now()
    return now.sec + now.usec / 1e6
end

core.register_action("hold", { "http-req" }, function(txn, seconds)
    seconds = tonumber(seconds)
    local began, gone = clock(), 0.0
    waited = waited + 1
    repeat
        core.msleep(STEP_MS)
        gone = clock() - began
        longest = math.max(longest, gone)
    until is(txn.f:srv_is_up("engine/engine")) or is(txn.f:stopping()) or gone >= seconds
end, 1)

-- "waited" on the admin socket: how many requests had to wait, and the longest wait in seconds,
-- since the last "waited reset" (which says nothing).
core.register_cli({ "waited" }, "waited [reset] : requests that waited, the longest in seconds",
    function(applet, _, word)
        if word == "reset" then
            waited, longest = 0, 0.0
        else
            applet:send(string.format("%d %.3f\n", waited, longest))
        end
    end)

-- HAProxy takes a server for healthy until its first check says otherwise.
core.register_task(function()
    core.backends["engine"].servers["engine"]:check_force_down()
end)
